//! The whole of a network but its edge: a real image resumed before it has arrived, lost, found again and put back
//! to sleep by the daemons as they run live, each a process that is killed here and there. Edge and CPA are
//! stand-ins that confirm and write down; chunks come over mutual TLS from the store that `VMATRIX_STORE` names.

// A test may stop where its own input is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod faults;
mod learn;
mod network;

use network::{MINUTE, Network, ask, assignment, kill, tiny};
use std::time::{Duration, Instant};

#[test]
fn machine_an_image_is_staged_resumed_found_again_and_put_back_to_sleep() {
    let network = Network::new("a");
    network.play(staged_and_found_again(&network));
}

async fn staged_and_found_again(network: &Network) {
    network.stand_ins().await;
    let _source = network.source(8446, None).await;
    let (mut vma, mut machine) = (network.start("vma"), network.start("machine"));

    // Staged and dormant.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(network.assign(&assignment(2, Some(0))).await, 204);
    assert_eq!(network.assign(&assignment(1, Some(1))).await, 409, "an older assignment was taken");
    let staged = network.until("staging", MINUTE, |h| h.image().1).await;
    assert_eq!(network.qemu().len(), 0);
    network.until("a QEMU that waits", MINUTE, |_| network.log("machine").contains("a QEMU waits")).await;
    let waits = network.spares();

    // Resumed in the process that waited: from the order to the first byte.
    let first_byte = network.first_byte(&assignment(3, Some(1))).await;
    network.until("serving", MINUTE, |h| h.serving() == 1).await;
    assert_eq!(network.qemu(), waits);
    let cell = network.slots()[0];
    assert!(ask(cell, 8080).await.is_none(), "an undeclared port answers");
    eprintln!("staged in {staged:?}; whole here: order to first byte {first_byte:?}");
    assert!(first_byte < Duration::from_secs(20), "{first_byte:?}");

    // Both daemons are killed: the VM goes on, is found again, and stays in rotation.
    let (before, pager) = (network.qemu(), network.pagers());
    network.kill(machine);
    network.kill(vma);
    assert!(ask(cell, 80).await.is_some());
    network.heard(|h| h.inventory = None);
    (vma, machine) = (network.start("vma"), network.start("machine"));
    network.until("serving after a restart", MINUTE, |h| h.serving() == 1).await;
    assert_eq!((network.qemu(), network.pagers(), network.slots()), (before.clone(), pager.clone(), vec![cell]));

    // The machine's daemon is dead for longer than its lease: what it runs answers, and stays in rotation.
    network.kill(machine);
    let until_then = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until_then {
        let (slots, serving) = network.heard(|h| (h.slots(), h.serving()));
        assert_eq!((slots.as_slice(), serving), (&[cell][..], 1));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let told = network.heard(|h| h.inventory.as_ref().and_then(|i| i.instances[0].trouble.clone()));
    assert!(told.is_some_and(|t| t.contains("m1 is silent")));
    machine = network.start("machine");
    let back = |h: &network::Heard| h.inventory.as_ref().is_some_and(|i| i.instances[0].trouble.is_none());
    network.until("the machine's return", MINUTE, |h| back(h) && h.serving() == 1).await;
    assert_eq!((network.qemu(), network.slots()), (before.clone(), vec![cell]));

    // QEMU dies: out of rotation, and back.
    kill(before[0]);
    let out = network.until("leaving rotation", MINUTE, |h| h.slots().is_empty()).await;
    network.until("coming back", MINUTE, |h| h.serving() == 1).await;
    assert_ne!(network.qemu(), before);
    eprintln!("a lost VM left rotation after {out:?}");

    // Back to dormant, then nothing.
    assert_eq!(network.assign(&assignment(4, Some(0))).await, 204);
    let asleep = |h: &network::Heard| h.inventory.as_ref().is_some_and(|i| i.instances.is_empty());
    network.until("the suspend", MINUTE, |h| asleep(h) && h.image().1).await;
    assert_eq!((network.qemu().len(), network.namespaces().len()), (0, 0));
    assert_eq!(network.pagers(), pager, "the image is not kept ready");
    assert_eq!(network.assign(&assignment(5, None)).await, 204);
    let images = network.dir.path().join("m/store/images");
    network.until("dropping the image", MINUTE, |_| std::fs::read_dir(&images).unwrap().count() == 0).await;
    assert_eq!(std::fs::read_dir(network.dir.path().join("m/cells")).unwrap().count(), 0);
    let memory = std::path::Path::new("/dev/shm").join(&network.name);
    assert_eq!(std::fs::read_dir(memory).unwrap().count(), 0, "memory of a dropped image is kept");
    assert_eq!(network.pagers().len(), 0, "the pager of a dropped image goes on");
    network.kill(machine);
    network.kill(vma);
}

#[test]
fn machine_an_order_where_nothing_is_gets_an_answer_before_the_image_has_arrived() {
    let network = Network::new("b");
    network.play(async {
        network.stand_ins().await;
        // The image has some 34 MB as stored: eight seconds of this.
        let _source = network.source(8446, Some(32)).await;
        network.start("vma");
        network.start("machine");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let first_byte = network.first_byte(&assignment(1, Some(1))).await;
        network
            .until("an inventory", MINUTE, |h| h.inventory.as_ref().is_some_and(|i| i.images.contains_key(&tiny())))
            .await;
        let (resumable, whole) = network.heard(|h| h.image());
        eprintln!("nothing here: order to first byte {first_byte:?}");
        assert!(resumable && !whole, "all of it had to come first");
        let rest = network.until("the rest", MINUTE, |h| h.image().1).await;
        eprintln!("the rest took {rest:?} more");
        assert!(ask(network.slots()[0], 80).await.is_some());
    });
}
