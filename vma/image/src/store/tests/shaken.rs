//! A bucket in memory whose requests take their time and sometimes fail.

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// One request of so many fails.
const FAILS: u64 = 300;

#[derive(Debug, Clone)]
pub(super) struct Shaken {
    inner: Arc<InMemory>,
    state: Arc<AtomicU64>,
    calm: Arc<AtomicBool>,
}

impl Shaken {
    pub(super) fn new(seed: u64) -> Shaken {
        Shaken { inner: Arc::default(), state: Arc::new(seed.into()), calm: Arc::default() }
    }

    pub(super) fn calm(&self) {
        self.calm.store(true, Relaxed);
    }

    /// Some time, up to 2 ms, and sometimes a fault.
    async fn shake(&self) -> Result<()> {
        if self.calm.load(Relaxed) {
            return Ok(());
        }
        // splitmix64
        let mut z = self.state.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        if z.is_multiple_of(4) {
            tokio::time::sleep(Duration::from_micros(z >> 8 & 0x7ff)).await;
        } else if z % 4 == 1 {
            tokio::task::yield_now().await;
        }
        if (z >> 32).is_multiple_of(FAILS) {
            return Err(Error::Generic { store: "shaken", source: "the line broke".into() });
        }
        Ok(())
    }
}

impl fmt::Display for Shaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Shaken {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.shake().await?;
        let put = self.inner.put_opts(location, payload, opts).await?;
        self.shake().await.map(|()| put)
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.shake().await?;
        let got = self.inner.get_opts(location, options).await?;
        self.shake().await.map(|()| got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        locations
            .then(move |location| {
                let this = this.clone();
                async move {
                    this.shake().await?;
                    let location = location?;
                    let one = futures_util::stream::iter([Ok(location)]).boxed();
                    let mut outcomes: Vec<_> = this.inner.delete_stream(one).collect().await;
                    this.shake().await?;
                    outcomes.pop().unwrap_or(Err(Error::NotImplemented {
                        operation: "delete".to_owned(),
                        implementer: "nothing".to_owned(),
                    }))
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            if let Err(error) = this.shake().await {
                return futures_util::stream::iter([Err(error)]).boxed();
            }
            let listed: Vec<_> = this.inner.list(prefix.as_ref()).collect().await;
            let _ = this.shake().await;
            futures_util::stream::iter(listed).boxed()
        };
        futures_util::stream::once(listed).flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
