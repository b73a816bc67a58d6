//! A wire between a client and a server, that can be long or cut.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

pub struct Wire {
    pub address: SocketAddr,
    /// While it is cut nothing passes, and connections end.
    pub cut: Arc<AtomicBool>,
    /// Bytes that came from the server.
    pub bytes: Arc<AtomicU64>,
}

impl Wire {
    /// One that cuts itself once `bytes` have come from the server.
    pub async fn cut_after(server: SocketAddr, bytes: u64) -> Wire {
        Wire::to(server, bytes, Duration::ZERO).await
    }

    /// One on which everything takes `way` in each direction.
    pub async fn slow(server: SocketAddr, way: Duration) -> Wire {
        Wire::to(server, u64::MAX, way).await
    }

    async fn to(server: SocketAddr, stop_after: u64, way: Duration) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let wire = Wire { address, cut: Arc::clone(&cut), bytes: Arc::clone(&bytes) };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if cut.load(Ordering::SeqCst) {
                    continue;
                }
                let server = TcpStream::connect(server).await.unwrap();
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let ((cr, cw), (sr, sw)) = (client.into_split(), server.into_split());
                let (cut, bytes) = (Arc::clone(&cut), Arc::clone(&bytes));
                tokio::spawn(async move {
                    let nobody = AtomicU64::new(0);
                    tokio::select! {
                        () = copy(cr, sw, &cut, &nobody, u64::MAX, way) => {}
                        () = copy(sr, cw, &cut, &bytes, stop_after, way) => {}
                    }
                });
            }
        });
        wire
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    cut: &AtomicBool,
    count: &AtomicU64,
    stop_after: u64,
    way: Duration,
) {
    let (send, mut under_way) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let enter = async move {
        let mut bytes = [0; 16_384];
        while let Ok(length @ 1..) = from.read(&mut bytes).await {
            let before = count.fetch_add(length as u64, Ordering::SeqCst);
            if before < stop_after && before + length as u64 >= stop_after {
                cut.store(true, Ordering::SeqCst);
            }
            if cut.load(Ordering::SeqCst) || send.send((Instant::now() + way, bytes[..length].to_vec())).is_err() {
                return;
            }
        }
    };
    let leave = async move {
        while let Some((at, bytes)) = under_way.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = enter => {}
        () = leave => {}
    }
}
