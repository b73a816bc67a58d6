//! The manifests of the image store, by name: what the CPA prices images by. Machines get them, and every byte
//! they name, from `vmatrix store` over mutual TLS.

use crate::http::Refusal;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use vmatrix_model::ServiceId;
use vmatrix_model::manifest::MANIFEST_MAX;

/// `GET /v1/images/{name}`: the signed manifest.
pub async fn image(
    State(store): State<Arc<PathBuf>>,
    Path(name): Path<String>,
) -> Result<impl IntoResponse + use<>, Refusal> {
    // An image is named as a service is: such a name cannot lead out of the folder.
    if name.parse::<ServiceId>().is_err() {
        return Err(Refusal::because(
            StatusCode::BAD_REQUEST,
            format!("{:?} is not an image name", name.chars().take(80).collect::<String>()),
            "use 1 to 30 of a-z, 0-9 and -, beginning with a letter",
        ));
    }
    let path = store.join("images").join(format!("{name}.json"));
    let read = async {
        let mut text = Vec::new();
        // JSON text within JSON: quotes and newlines are escaped, so it may be larger than the manifest.
        tokio::fs::File::open(&path).await?.take(2 * MANIFEST_MAX as u64).read_to_end(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = read.await.map_err(|e| match e.kind() {
        ErrorKind::NotFound => Refusal::because(
            StatusCode::NOT_FOUND,
            format!("image {name} is not in the store"),
            "build it into this store with `vmatrix image build`",
        ),
        _ => Refusal::because(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("image {name} cannot be read: {e}"),
            "look at the store's disk and its rights",
        ),
    })?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text))
}
