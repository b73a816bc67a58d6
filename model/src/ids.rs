//! Names of things. A name is a DNS label, so it can stand in a record, a path and a log line.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A name that is not a DNS label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} name {name:?} is not a DNS label: use 1 to 30 of a-z, 0-9 and -, beginning with a letter")]
pub struct BadName {
    kind: &'static str,
    name: String,
}

/// Longest name: three joined by dots or dashes still fit a 63-byte DNS label and a 100-byte path.
const NAME_MAX: usize = 30;

fn check_name(kind: &'static str, name: &str) -> Result<(), BadName> {
    let good = name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if good { Ok(()) } else { Err(BadName { kind, name: name.chars().take(80).collect() }) }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $type {
            type Err = BadName;
            fn from_str(name: &str) -> Result<Self, BadName> {
                check_name($kind, name)?;
                Ok(Self(name.to_owned()))
            }
        }
        impl TryFrom<String> for $type {
            type Error = BadName;
            fn try_from(name: String) -> Result<Self, BadName> {
                check_name($kind, &name)?;
                Ok(Self(name))
            }
        }
        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(/** Any place on the WAN: the origin, a hosting network or a client region. */ SiteId, "site");
name!(/** A hosting network (the paper's HN). */ NetworkId, "network");
name!(/** A client region: a client cluster that has a place on the map. */ RegionId, "region");
name!(/** A service. */ ServiceId, "service");
name!(/** A real machine (the paper's RM), unique within its network. */ MachineId, "machine");

impl From<&NetworkId> for SiteId {
    fn from(n: &NetworkId) -> SiteId {
        SiteId(n.0.clone())
    }
}
impl From<&RegionId> for SiteId {
    fn from(r: &RegionId) -> SiteId {
        SiteId(r.0.clone())
    }
}

/// One instance, unique within its network: `maps-0` is the first of `maps`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId {
    /// The service it is an instance of.
    pub service: ServiceId,
    /// Its number within (service, network), from 0.
    pub number: u32,
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.service, self.number)
    }
}

/// The number of a wanted state; a newer one replaces an older one, an older one is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Generation(pub u64);

impl Generation {
    /// The next number; the last one stays the last.
    pub fn next(self) -> Generation {
        Generation(self.0.saturating_add(1))
    }
}
impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// A BLAKE3 digest; text form is 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Digests bytes.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }
    /// The first eight hex digits, for people.
    pub fn short(&self) -> String {
        self.to_string().chars().take(8).collect()
    }
}
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.short())
    }
}
/// Text that is not 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("digest {0:?} is not 64 lower-case hex digits")]
pub struct BadDigest(String);

impl FromStr for Digest {
    type Err = BadDigest;
    fn from_str(text: &str) -> Result<Self, BadDigest> {
        blake3::Hash::from_hex(text)
            .map(|h| Digest(*h.as_bytes()))
            .map_err(|_| BadDigest(text.chars().take(80).collect()))
    }
}
impl TryFrom<String> for Digest {
    type Error = BadDigest;
    fn try_from(text: String) -> Result<Self, BadDigest> {
        text.parse()
    }
}
impl From<Digest> for String {
    fn from(d: Digest) -> String {
        d.to_string()
    }
}

/// Names an owner's key without telling it: derived from it by BLAKE3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(pub Digest);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_dns_label() {
        assert!("tokyo-2".parse::<NetworkId>().is_ok());
        for bad in ["", "2tokyo", "Tokyo", "a_b", "a.b", "../etc", "tokyo-", &"a".repeat(31)] {
            assert!(bad.parse::<NetworkId>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_digest_survives_its_text_form() {
        let d = Digest::of(b"vmatrix");
        assert_eq!(d.to_string().parse::<Digest>(), Ok(d));
        assert!("abc".parse::<Digest>().is_err());
    }
}
