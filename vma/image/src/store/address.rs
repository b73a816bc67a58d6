//! Where a store is, as people write it ─▶ a folder, or a bucket with what is needed to ask it.

use crate::error::{Error, Result};
use std::path::PathBuf;
use url::Url;
use zeroize::Zeroizing;

/// Region that is signed for where none is named; S3-compatible servers mostly take any.
const REGION: &str = "us-east-1";

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Address {
    Folder(PathBuf),
    Bucket(BucketAddress),
}

#[derive(PartialEq, Eq)]
pub(super) struct BucketAddress {
    pub bucket: String,
    /// Without a slash at either end; may be empty.
    pub prefix: String,
    /// `http://HOST:PORT`; that of the region where none is named.
    pub endpoint: Option<String>,
    pub region: String,
    pub key_id: String,
    pub secret: Zeroizing<String>,
    pub token: Option<Zeroizing<String>>,
}

impl std::fmt::Debug for BucketAddress {
    /// Without the secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "s3://{}/{} at {:?} in {}", self.bucket, self.prefix, self.endpoint, self.region)
    }
}

impl Address {
    /// Reads an address; `env` answers for the credentials.
    pub(super) fn parse(text: &str, env: impl Fn(&str) -> Option<String>) -> Result<Address> {
        if !text.contains("://") {
            return Ok(Address::Folder(PathBuf::from(text)));
        }
        let bad = |problem: String| Error::BadAddress { address: text.chars().take(200).collect(), problem };
        let url = Url::parse(text).map_err(|e| bad(e.to_string()))?;
        if url.scheme() != "s3" {
            return Err(bad(format!("{}:// is no kind of store", url.scheme())));
        }
        if !url.username().is_empty() || url.password().is_some() || url.port().is_some() {
            return Err(bad("credentials and ports do not belong before the bucket's name".to_owned()));
        }
        let bucket =
            url.host_str().filter(|b| is_bucket_name(b)).ok_or_else(|| bad("it names no bucket".to_owned()))?;
        let (mut endpoint, mut region) = (None, REGION.to_owned());
        for (name, value) in url.query_pairs() {
            match name.as_ref() {
                "endpoint" => endpoint = Some(check_endpoint(&value).map_err(&bad)?),
                "region" if is_word(&value) => region = value.into_owned(),
                other => return Err(bad(format!("{other}={value} is neither endpoint=… nor region=…"))),
            }
        }
        let prefix = url.path().trim_matches('/').to_owned();
        if !prefix.split('/').all(|part| prefix.is_empty() || is_word(part)) {
            return Err(bad(format!("{prefix:?} is no plain prefix of letters, digits and -_. between slashes")));
        }
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        let needed = |name: &str| set(name).ok_or_else(|| bad(format!("{name} is not in the environment; set it")));
        Ok(Address::Bucket(BucketAddress {
            bucket: bucket.to_owned(),
            prefix,
            endpoint,
            region,
            key_id: needed("AWS_ACCESS_KEY_ID")?,
            secret: Zeroizing::new(needed("AWS_SECRET_ACCESS_KEY")?),
            token: set("AWS_SESSION_TOKEN").map(Zeroizing::new),
        }))
    }
}

fn check_endpoint(text: &str) -> std::result::Result<String, String> {
    let url = Url::parse(text).map_err(|e| format!("endpoint {text:?}: {e}"))?;
    let plain = matches!(url.scheme(), "http" | "https") && url.path() == "/" && url.query().is_none();
    if !plain || url.host_str().is_none() || !url.username().is_empty() {
        return Err(format!("endpoint {text:?} is not http://HOST:PORT or https://HOST"));
    }
    Ok(text.trim_end_matches('/').to_owned())
}

fn is_bucket_name(text: &str) -> bool {
    (3..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
}

/// One step of a prefix, or a region: nothing that leads elsewhere or has to be escaped.
fn is_word(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && !text.starts_with('.')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address> {
        Address::parse(text, |name| (name != "AWS_SESSION_TOKEN").then(|| format!("{name} of the test")))
    }

    fn bucket(text: &str) -> BucketAddress {
        match parse(text).unwrap() {
            Address::Bucket(address) => address,
            Address::Folder(path) => panic!("{text} is the folder {}", path.display()),
        }
    }

    #[test]
    fn a_path_is_a_folder_and_an_s3_address_a_bucket() {
        assert_eq!(parse("some/where").unwrap(), Address::Folder("some/where".into()));
        let full = bucket("s3://images/fleet/a?endpoint=http://127.0.0.1:9000&region=garage");
        assert_eq!((full.bucket.as_str(), full.prefix.as_str()), ("images", "fleet/a"));
        assert_eq!((full.endpoint.as_deref(), full.region.as_str()), (Some("http://127.0.0.1:9000"), "garage"));
        let short = bucket("s3://images");
        assert_eq!((short.prefix.as_str(), short.endpoint, short.region.as_str()), ("", None, REGION));
        assert_eq!(short.token, None);
    }

    #[test]
    fn what_is_no_address_is_refused_with_its_fault() {
        for (text, word) in [
            ("gs://images", "no kind of store"),
            ("s3:///x", "no bucket"),
            ("s3://A", "no bucket"),
            ("s3://key:secret@images", "do not belong"),
            ("s3://images/../other?endpoint=ftp://x", "endpoint"),
            ("s3://images/a%20b", "no plain prefix"),
            ("s3://images?endpoint=http://user@host", "endpoint"),
            ("s3://images?endpoint=127.0.0.1:9000", "endpoint"),
            ("s3://images?regoin=x", "neither"),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(word), "{error} does not say {word}");
        }
    }

    #[test]
    fn a_missing_credential_is_named_and_a_present_one_never_printed() {
        let error = Address::parse("s3://images", |_| None).unwrap_err().to_string();
        assert!(error.contains("AWS_ACCESS_KEY_ID"), "{error}");
        assert!(!format!("{:?}", bucket("s3://images")).contains("of the test"));
    }
}
