//! Asks the origin how large each service's image is; until it answers, the fleet's profile stands in.

use crate::owner::Ask;
use std::time::Duration;
use tokio::sync::mpsc;
use vmatrix_cpa_core::Event;
use vmatrix_model::Bytes;
use vmatrix_model::fleet::Fleet;
use vmatrix_model::manifest::{MANIFEST_MAX, Manifest, SignedManifest};

/// Between two tries while an image is not there yet.
const AGAIN: Duration = Duration::from_secs(5);
/// Images are built anew now and then; prices may lag that long.
const REFRESH: Duration = Duration::from_secs(300);

/// Keeps the core's image sizes fresh, for ever.
pub(crate) async fn fetch(http: reqwest::Client, origin: String, fleet: Fleet, inbox: mpsc::Sender<Ask>) {
    loop {
        let mut missing = false;
        for service in &fleet.services {
            match size(&http, &format!("{origin}/v1/images/{}", service.image)).await {
                Ok(bytes) => {
                    if inbox.send(Ask::Hear(Event::Image(service.name.clone(), bytes))).await.is_err() {
                        return;
                    }
                }
                Err(e) => {
                    missing = true;
                    tracing::debug!(image = service.image, "image size unknown: {e:#}");
                }
            }
        }
        tokio::time::sleep(if missing { AGAIN } else { REFRESH }).await;
    }
}

/// The signature is the machines' business: a wrong size here makes a wrong price, not a wrong VM.
async fn size(http: &reqwest::Client, url: &str) -> anyhow::Result<Bytes> {
    let answer = http.get(url).send().await?;
    if !answer.status().is_success() {
        return Err(crate::client::problem(answer).await.into());
    }
    let bytes = crate::client::bounded_to(answer, MANIFEST_MAX).await?;
    let signed: SignedManifest = serde_json::from_slice(&bytes)?;
    let manifest: Manifest = serde_json::from_str(&signed.manifest)?;
    Ok(manifest.stored())
}
