//! The image store as machines read it: manifests by name, chunks by digest, nothing else.

use crate::http::Refusal;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use vmatrix_model::Digest;

/// Piece of a file held in memory while it is sent.
const PIECE: usize = 64 << 10;

/// `GET /v1/images/{name}`: the signed manifest, or 304 to a machine that has this version of it.
pub async fn image(
    State(store): State<Arc<PathBuf>>,
    Path(name): Path<String>,
    asked: HeaderMap,
) -> Result<Response, Refusal> {
    let good = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-');
    if !good {
        return Err(Refusal::because(
            StatusCode::BAD_REQUEST,
            format!("{:?} is not an image name", name.chars().take(80).collect::<String>()),
            "use 1 to 64 of a-z, 0-9 and -",
        ));
    }
    let path = store.join("images").join(format!("{name}.json"));
    let known = asked.get(header::IF_NONE_MATCH).map(HeaderValue::as_bytes);
    let tag = tokio::fs::metadata(&path).await.ok().as_ref().and_then(version);
    if tag.as_ref().is_some_and(|tag| known == Some(tag.as_bytes())) {
        return Ok(StatusCode::NOT_MODIFIED.into_response());
    }
    let mut answer = stream(
        path,
        "application/json",
        &format!("image {name}"),
        "build it into this store with `vmatrix image build`",
    )
    .await?;
    // Looked up before the file was opened: if it was replaced in between, the next question finds out.
    if let Some(tag) = tag {
        answer.headers_mut().insert(header::ETAG, tag);
    }
    Ok(answer)
}

/// Names a version of a manifest: the store replaces the file whole, and never within one tick of the clock.
fn version(file: &std::fs::Metadata) -> Option<HeaderValue> {
    let since = file.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    HeaderValue::from_str(&format!("\"{:x}-{:x}\"", since.as_nanos(), file.len())).ok()
}

/// `GET /v1/chunks/{digest}`: the chunk as stored.
pub async fn chunk(State(store): State<Arc<PathBuf>>, Path(digest): Path<String>) -> Result<Response, Refusal> {
    // The digest's own text form goes into the path: 64 hex digits cannot lead out of the store.
    let digest: Digest = digest.parse().map_err(|e| {
        Refusal::because(StatusCode::BAD_REQUEST, format!("{e}"), "ask for a digest that a manifest names")
    })?;
    let text = digest.to_string();
    let folder = text.get(..2).unwrap_or_default();
    let path = store.join("chunks").join(folder).join(&text);
    stream(
        path,
        "application/octet-stream",
        &format!("chunk {}", digest.short()),
        "the store is not whole: build the image again",
    )
    .await
}

async fn stream(path: PathBuf, kind: &'static str, what: &str, hint: &str) -> Result<Response, Refusal> {
    let missing = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Refusal::because(StatusCode::NOT_FOUND, format!("{what} is not in the store"), hint)
        }
        _ => Refusal::because(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{what} cannot be read: {e}"),
            "look at the store's disk and its rights",
        ),
    };
    let file = tokio::fs::File::open(&path).await.map_err(missing)?;
    let length = file.metadata().await.map_err(missing)?.len();
    let pieces = futures_util::stream::try_unfold(file, |mut file| async move {
        let mut piece = Vec::with_capacity(PIECE);
        let read = (&mut file).take(PIECE as u64).read_to_end(&mut piece).await?;
        Ok::<_, std::io::Error>((read > 0).then(|| (Bytes::from(piece), file)))
    });
    let headers = [(header::CONTENT_TYPE, kind.to_owned()), (header::CONTENT_LENGTH, length.to_string())];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_manifest_is_sent_once_for_each_version() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("images")).unwrap();
        let path = folder.path().join("images/tiny.json");
        let ask = async |known: Option<&HeaderValue>| {
            let asked = known.map(|tag| (header::IF_NONE_MATCH, tag.clone())).into_iter().collect();
            image(State(Arc::new(folder.path().to_owned())), Path("tiny".into()), asked).await
        };
        assert!(ask(None).await.is_err(), "there is no such image yet");
        std::fs::write(&path, "{}").unwrap();
        let first = ask(None).await.unwrap();
        let tag = first.headers().get(header::ETAG).cloned();
        assert_eq!((first.status(), tag.is_some()), (StatusCode::OK, true));
        assert_eq!(ask(tag.as_ref()).await.unwrap().status(), StatusCode::NOT_MODIFIED);
        std::fs::write(&path, "{ }").unwrap();
        let second = ask(tag.as_ref()).await.unwrap();
        assert_eq!(second.status(), StatusCode::OK);
        assert_ne!(second.headers().get(header::ETAG), tag.as_ref());
    }
}
