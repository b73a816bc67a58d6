//! A store in a bucket of an S3-compatible object store.
//!
//! ```text
//! a call ─▶ one task on the program's one small runtime for buckets, with an end ─▶ its outcome, waited for
//! ```
//!
//! Waiting for a task rather than running it here lets a thread that is async by mistake block, and not panic.

use super::address::BucketAddress;
use super::{Entry, http};
use crate::error::{Error, Result};
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, SystemTime};
use tokio::runtime::Runtime;

/// Longest that a chunk or table may take: the largest, 64 MiB, over 5 Mbit/s.
const TRANSFER: Duration = Duration::from_secs(120);
/// Longest that anything else may take, a listing a page of 1000.
pub(super) const REQUEST: Duration = Duration::from_secs(20);
/// Requests that fail are made again so often: what does not pass in seconds is for people.
const RETRIES: usize = 3;
/// A chunk put this long ago is relied on; an older one is put again, for its age cannot be changed otherwise.
/// Far under any grace of the collector, so that whoever relied on it has time to name it.
const YOUNG: Duration = Duration::from_secs(3600);
/// How long a lock counts that nobody renews.
pub(super) const LEASE: Duration = Duration::from_secs(60);

/// Threads for all buckets of the program; they wait for the network, and hash for signatures.
const THREADS: usize = 2;
static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();

#[derive(Debug, Clone)]
pub(super) struct Bucket {
    objects: Arc<dyn ObjectStore>,
    prefix: String,
    /// For messages.
    place: PathBuf,
    pub(super) lease: Duration,
}

impl Bucket {
    pub(super) fn connect(address: &BucketAddress) -> Result<Bucket> {
        let place = PathBuf::from(format!("s3://{}/{}", address.bucket, address.prefix));
        let plain = address.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        let mut s3 = AmazonS3Builder::new()
            .with_bucket_name(&address.bucket)
            .with_region(&address.region)
            .with_access_key_id(&address.key_id)
            .with_secret_access_key(address.secret.as_str())
            .with_http_connector(http::Connector { tls: !plain })
            .with_retry(RetryConfig { max_retries: RETRIES, retry_timeout: REQUEST, ..RetryConfig::default() });
        if let Some(token) = &address.token {
            s3 = s3.with_token(token.as_str());
        }
        if let Some(endpoint) = &address.endpoint {
            s3 = s3.with_endpoint(endpoint).with_allow_http(plain);
        }
        let s3 = s3.build().map_err(|e| fault("connect to", &place)(e))?;
        Ok(Bucket::over(Arc::new(s3), &address.prefix, place))
    }

    pub(super) fn over(objects: Arc<dyn ObjectStore>, prefix: &str, place: PathBuf) -> Bucket {
        Bucket { objects, prefix: prefix.to_owned(), place, lease: LEASE }
    }

    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    pub(super) fn get(&self, key: &str, max: usize) -> Result<Option<Vec<u8>>> {
        let (at, objects) = (self.key(key), self.objects.clone());
        let path = self.place.join(key);
        let read = async move {
            let answer = objects.get(&at).await?;
            // Neither what is said to be too long is read, nor what turns out to be.
            let mut bytes = Vec::with_capacity(usize::try_from(answer.meta.size).unwrap_or(max).min(max));
            if answer.meta.size > max as u64 {
                return Ok(None);
            }
            let mut body = answer.into_stream();
            while let Some(part) = body.try_next().await? {
                if bytes.len() + part.len() > max {
                    return Ok(None);
                }
                bytes.extend_from_slice(&part);
            }
            Ok(Some(bytes))
        };
        match self.run("read", key, TRANSFER, read)? {
            None => Ok(None),
            Some(Some(bytes)) => Ok(Some(bytes)),
            Some(None) => Err(Error::TooLong { path, max }),
        }
    }

    pub(super) fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let (at, objects, payload) = (self.key(key), self.objects.clone(), PutPayload::from(bytes.to_vec()));
        self.run("write", key, TRANSFER, async move { objects.put(&at, payload).await.map(drop) }).map(drop)
    }

    pub(super) fn look(&self, key: &str) -> Result<Option<Entry>> {
        let (at, objects) = (self.key(key), self.objects.clone());
        Ok(self.run("look at", key, REQUEST, async move { objects.head(&at).await })?.map(entry))
    }

    pub(super) fn list(&self, under: &str) -> Result<Vec<Entry>> {
        let (at, objects) = (self.key(under), self.objects.clone());
        let all = async move { objects.list(Some(&at)).try_collect::<Vec<ObjectMeta>>().await };
        let all = self.run("list", under, TRANSFER, all)?.unwrap_or_default();
        // What lies deeper is somebody else's.
        let depth = self.key(under).parts().count() + 1;
        Ok(all.into_iter().filter(|meta| meta.location.parts().count() == depth).map(entry).collect())
    }

    pub(super) fn remove(&self, keys: &[String]) -> Result<()> {
        let Some(first) = keys.first() else { return Ok(()) };
        let objects = self.objects.clone();
        let at: Vec<object_store::Result<Key>> = keys.iter().map(|key| Ok(self.key(key))).collect();
        let gone = async move {
            let mut outcomes = objects.delete_stream(futures_util::stream::iter(at).boxed());
            while let Some(outcome) = outcomes.next().await {
                match outcome {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        };
        self.run("remove", first, REQUEST, gone).map(drop)
    }

    fn key(&self, key: &str) -> Key {
        Key::from(if self.prefix.is_empty() { key.to_owned() } else { format!("{}/{key}", self.prefix) })
    }

    /// Runs a request to its end, at most `limit` long; `None` if what it asks for is not there.
    fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        key: &str,
        limit: Duration,
        request: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<Option<T>> {
        let path = self.place.join(key);
        let lost = |problem: &str| fault(what, &path)(std::io::Error::other(problem.to_owned()));
        let runtime = RUNTIME
            .get_or_init(|| {
                let mut builder = tokio::runtime::Builder::new_multi_thread();
                builder.worker_threads(THREADS).thread_name("bucket").enable_all().build().ok()
            })
            .as_ref()
            .ok_or_else(|| lost("no thread can be started for it"))?;
        let (done, outcome) = mpsc::sync_channel(1);
        runtime.spawn(async move {
            // Nobody waits any more only if this program ends.
            let _ = done.send(tokio::time::timeout(limit, request).await);
        });
        match outcome.recv() {
            Ok(Ok(Ok(value))) => Ok(Some(value)),
            Ok(Ok(Err(object_store::Error::NotFound { .. }))) => Ok(None),
            Ok(Ok(Err(e))) => Err(fault(what, &path)(e)),
            Ok(Err(_)) => Err(lost(&format!("no whole answer within {limit:?}"))),
            Err(_) => Err(lost("the request broke off")),
        }
    }
}

/// Whether a chunk was put so lately that it may be relied on without putting it again. A wrong clock here costs
/// an upload too many, or one that [`super::Store::publish`] asks for.
pub(super) fn is_young(entry: &Entry) -> bool {
    SystemTime::now().duration_since(entry.modified).unwrap_or_default() < YOUNG
}

fn entry(meta: ObjectMeta) -> Entry {
    Entry {
        name: meta.location.filename().unwrap_or_default().to_owned(),
        length: meta.size,
        modified: meta.last_modified.into(),
        version: format!("{} {}", meta.last_modified.timestamp_micros(), meta.e_tag.unwrap_or_default()),
    }
}

fn fault<'a, E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
    place: &'a Path,
) -> impl FnOnce(E) -> Error + 'a {
    move |source| Error::Bucket { what, place: place.to_owned(), source: source.into() }
}
