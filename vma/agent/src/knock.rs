//! Cells whose machine is silent ─▶ does the guest still take a connection? ─▶ the core.
//!
//! The VM agent stands where the edge stands, so what answers here answers the edge's clients. It opens
//! a connection and says nothing: enough to tell a guest that runs from one that does not.

use futures_util::StreamExt;
use std::net::SocketAddrV4;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use vmatrix_vma_core::Doubt;
use vmatrix_vma_core::steps::Event;

/// Between rounds.
const EVERY: Duration = Duration::from_secs(1);
/// Cells are near; a guest in a crowd takes its time.
const LIMIT: Duration = Duration::from_secs(2);
/// Knocks at the same time.
const AT_ONCE: usize = 64;

/// Knocks as long as there are doubts; ends when nobody hears.
pub async fn run(mut doubts: watch::Receiver<Vec<Doubt>>, heard: mpsc::Sender<Event>) {
    loop {
        if doubts.wait_for(|d| !d.is_empty()).await.is_err() {
            return;
        }
        let round = doubts.borrow_and_update().clone();
        let mut answers = futures_util::stream::iter(round).map(knock).buffer_unordered(AT_ONCE);
        while let Some(event) = answers.next().await {
            if heard.send(event).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

async fn knock(doubt: Doubt) -> Event {
    let Doubt { machine, instance, address, port } = doubt;
    let opened = tokio::time::timeout(LIMIT, TcpStream::connect(SocketAddrV4::new(address, port))).await;
    let answered = matches!(opened, Ok(Ok(_)));
    if !answered {
        tracing::warn!(%machine, %instance, %address, "the machine is silent, and its guest does not answer");
    }
    Event::Knocked { machine, instance, answered }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_answers_and_who_does_not_does_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
            let doubt = |number: u32, port| Doubt {
                machine: "m1".parse().unwrap(),
                instance: vmatrix_model::InstanceId { service: "maps".parse().unwrap(), number },
                address: [127, 0, 0, 1].into(),
                port,
            };
            let all = vec![doubt(0, listener.local_addr().unwrap().port()), doubt(1, closed)];
            let (doubts, hears) = (watch::Sender::new(all), mpsc::channel(8));
            let knocking = tokio::spawn(run(doubts.subscribe(), hears.0));
            let mut heard = hears.1;
            for _ in 0..2 {
                let Some(Event::Knocked { instance, answered, .. }) = heard.recv().await else { panic!() };
                assert_eq!(answered, instance.number == 0, "{instance}");
            }
            knocking.abort();
        });
    }
}
