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
    while let Some(missing) = round(&http, &origin, &fleet, &inbox).await {
        tokio::time::sleep(if missing { AGAIN } else { REFRESH }).await;
    }
}

/// Asks for every image once and says whether one was missing; none once nobody listens.
async fn round(http: &reqwest::Client, origin: &str, fleet: &Fleet, inbox: &mpsc::Sender<Ask>) -> Option<bool> {
    let mut missing = false;
    for service in &fleet.services {
        match size(http, &format!("{origin}/v1/images/{}", service.image)).await {
            Ok(bytes) => inbox.send(Ask::Hear(Event::Image(service.name.clone(), bytes))).await.ok()?,
            Err(e) => {
                missing = true;
                tracing::debug!(image = service.image, "image size unknown: {e:#}");
            }
        }
    }
    Some(missing)
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::Path;
    use axum::http::StatusCode;
    use axum::{Json, Router, routing::get};
    use vmatrix_model::config::parse_toml;

    #[derive(serde::Deserialize)]
    struct File {
        fleet: Fleet,
    }

    /// A manifest whose tables, device state and packs have 741 stored bytes together.
    fn signed(name: &str) -> SignedManifest {
        let blob =
            |stored| serde_json::json!({ "digest": vmatrix_model::Digest::of(b""), "stored": stored, "plain": 1 });
        let manifest = serde_json::json!({
            "format": 2,
            "name": name,
            "recipe": vmatrix_model::Digest::of(b"recipe"),
            "machine": { "qemu_version": "10.0.2", "machine_type": "pc-q35-10.0", "cpu_model": "max", "accelerator": "tcg",
                "smp": 1, "memory_mib": 512, "devices": [], "netdev": "tap", "append": "" },
            "guest": { "address": "192.168.1.10", "gateway": "192.168.1.1", "mac": "52:54:00:00:00:01", "ports": [80],
                "health": { "port": 80, "path": "/", "status": 200 }, "backends": [] },
            "memory": { "size": 4096, "zero_pages": 0, "parent_pages": 0, "first": blob(10), "rest": blob(20),
                "working_set": { "pages": 1, "stored": 600, "requests": 60 }, "stored": 670 },
            "device": blob(41),
            "parts": [],
            "measured": { "boot_ms": 1, "answer_ms": 1 },
        });
        SignedManifest { manifest: manifest.to_string(), signature: String::new(), signer: String::new() }
    }

    async fn image(Path(name): Path<String>) -> Result<Json<SignedManifest>, StatusCode> {
        match name.as_str() {
            "maps" => Ok(Json(signed("maps"))),
            _ => Err(StatusCode::NOT_FOUND),
        }
    }

    #[tokio::test]
    async fn an_image_that_is_there_is_priced_by_its_size_and_one_that_is_not_is_asked_for_again() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/v1/images/{name}", get(image))).await });
        let scenario = include_str!("../../../scenarios/library/flash-crowd.toml");
        let mut fleet = parse_toml::<File>("flash-crowd.toml", scenario).unwrap().fleet;
        let maps = fleet.services.iter_mut().find(|s| s.name.as_str() == "maps").unwrap();
        maps.image = "maps".into();
        for other in fleet.services.iter_mut().filter(|s| s.name.as_str() != "maps") {
            other.image = "not-built-yet".into();
        }
        let http = crate::client::builder("token").unwrap().build().unwrap();
        let (inbox, mut asks) = mpsc::channel(8);
        assert_eq!(round(&http, &origin, &fleet, &inbox).await, Some(true));
        let Ok(Ask::Hear(Event::Image(service, bytes))) = asks.try_recv() else { panic!("nothing heard") };
        assert_eq!((service.as_str(), bytes), ("maps", Bytes(741)));
        assert!(asks.try_recv().is_err(), "of the image that is missing nothing is said");
        fleet.services.retain(|s| s.name.as_str() == "maps");
        assert_eq!(round(&http, &origin, &fleet, &inbox).await, Some(false));
        drop(asks);
        assert_eq!(round(&http, &origin, &fleet, &inbox).await, None, "it ends with the owner");
    }
}
