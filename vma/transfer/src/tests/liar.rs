//! A source that has every chunk and does wrong with it.

use crate::frame::{self, Answer, DATA_MAX, Request, What};
use crate::identity::Identity;
use crate::tls;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, split};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;
use vmatrix_model::Digest;
use vmatrix_vma_image::Store;

/// What it does with a chunk that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// One bit is another.
    Corrupt,
    /// It says that it is shorter, and sends so much.
    Truncate,
    /// It sends another chunk's bytes, as many as there must be.
    Swap,
    /// It does not end where it said.
    Endless,
    /// It closes the connection in the middle.
    Close,
    /// It sends half, and nothing more, but answers pings.
    Stall,
    /// It answers nothing at all.
    Silent,
    /// It says it sends something that was not asked for.
    Unasked,
    /// It sends bytes of a stream that never began.
    Stray,
    /// It sends a frame that is none.
    Garbage,
    /// It claims a chunk of 4 GiB.
    Huge,
}

pub const ALL: [Lie; 11] = [
    Lie::Corrupt,
    Lie::Truncate,
    Lie::Swap,
    Lie::Endless,
    Lie::Close,
    Lie::Stall,
    Lie::Silent,
    Lie::Unasked,
    Lie::Stray,
    Lie::Garbage,
    Lie::Huge,
];

pub struct Liar {
    pub address: SocketAddr,
    /// How often it was asked for a chunk.
    pub asked: Arc<AtomicUsize>,
}

impl Liar {
    pub async fn start(identity: &Identity, store: &Store, lie: Lie) -> Liar {
        let acceptor = tls::acceptor(identity).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let (count, store) = (Arc::clone(&asked), store.clone());
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, store, count) = (acceptor.clone(), store.clone(), Arc::clone(&count));
                tokio::spawn(async move {
                    if let Ok(tls) = acceptor.accept(tcp).await {
                        let _ = talk(tls, &store, lie, &count).await;
                    }
                });
            }
        });
        Liar { address, asked }
    }
}

async fn talk(tls: TlsStream<TcpStream>, store: &Store, lie: Lie, asked: &AtomicUsize) -> std::io::Result<()> {
    let (mut read, mut write) = split(tls);
    let mut bytes = Vec::new();
    let mut stream = 0;
    while frame::read(&mut read, &mut bytes).await.unwrap_or(false) {
        match Request::decode(&bytes) {
            Ok(Request::Ping { token }) => write.write_all(&Answer::Pong { token }.encode()).await?,
            Ok(Request::Get { digest, .. }) => {
                asked.fetch_add(1, Ordering::Relaxed);
                stream += 1;
                let frames = frames(&store.chunk(&digest).unwrap(), digest, stream, lie);
                for frame in frames {
                    write.write_all(&frame).await?;
                    write.flush().await?;
                }
                match lie {
                    Lie::Close => return write.shutdown().await,
                    Lie::Endless => loop {
                        let more = Answer::Data { stream, bytes: &[0; DATA_MAX] }.encode();
                        write.write_all(&more).await?;
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    },
                    _ => {}
                }
            }
            _ => {}
        }
        write.flush().await?;
    }
    Ok(())
}

fn frames(stored: &[u8], digest: Digest, stream: u32, lie: Lie) -> Vec<Vec<u8>> {
    let begin =
        |digest, length: usize| Answer::Begin { stream, what: What::Chunk { digest }, length: length as u32 }.encode();
    let data = |bytes: &[u8]| {
        bytes.chunks(DATA_MAX).map(|part| Answer::Data { stream, bytes: part }.encode()).collect::<Vec<_>>()
    };
    let whole = |bytes: &[u8]| [vec![begin(digest, bytes.len())], data(bytes)].concat();
    let half = &stored[..stored.len() / 2];
    match lie {
        Lie::Corrupt => {
            let mut bytes = stored.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            whole(&bytes)
        }
        Lie::Truncate => whole(half),
        Lie::Swap => whole(&super::fleet::noise(99, stored.len())),
        Lie::Endless => whole(stored)[..1].iter().cloned().chain(data(&[stored, b"more"].concat())).collect(),
        Lie::Close | Lie::Stall => [vec![begin(digest, stored.len())], data(half)].concat(),
        Lie::Silent => vec![],
        Lie::Unasked => vec![begin(Digest::of(b"unasked"), 50 << 20), begin(digest, stored.len() + 1)],
        Lie::Stray => vec![Answer::Data { stream: 77, bytes: half }.encode()],
        Lie::Garbage => vec![vec![0, 0, 0, 3, 200, 1, 2]],
        Lie::Huge => vec![begin(digest, u32::MAX as usize)],
    }
}
