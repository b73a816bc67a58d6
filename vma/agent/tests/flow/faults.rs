//! What can go wrong between a machine and its images: none hangs, none resumes wrong memory, each says what happened.

use crate::network::{MINUTE, Network, ask, assignment, kill, tiny};
use std::time::{Duration, Instant};
use vmatrix_vma_image::{guest, netns};
use vmatrix_vma_testing::Small;

/// Wants an instance and answers the reason why it is refused.
fn refusal(network: &Network) -> String {
    network.play(async {
        network.stand_ins().await;
        let _source = network.source(8446, None).await;
        network.start("vma");
        network.start("machine");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(network.assign(&assignment(1, Some(1))).await, 204);
        network
            .until("a refusal that lasts", MINUTE, |h| {
                h.inventory.as_ref().is_some_and(|i| i.refused.values().any(|r| r.contains("m1: ")))
            })
            .await;
        let began = Instant::now();
        while !(network.qemu().is_empty() && network.namespaces().is_empty()) {
            assert!(began.elapsed() < MINUTE, "something runs from a refused image\n{}", network.log("machine"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    network.heard(|h| h.inventory.as_ref().unwrap().refused[&tiny()].clone())
}

#[test]
fn machine_an_image_nobody_here_trusts_is_refused_by_signer() {
    let network = Network::new("c");
    network.configure(&[8446], &format!("signers = ['{}']", "0".repeat(64)));
    let said = refusal(&network);
    assert!(said.contains("not trusted here") && said.contains("\"tiny\""), "{said}");
}

#[test]
fn machine_a_full_disk_while_staging_is_said_and_nothing_runs() {
    let network = Network::new("d");
    let _small = Small::new(network.dir.path().join("m"), "1m");
    let said = refusal(&network);
    // Of a chunk, or of what the machine writes down itself.
    assert!(said.to_lowercase().contains("no space left"), "{said}");
}

#[test]
fn machine_a_pager_that_is_killed_is_started_again_and_its_guest_goes_on() {
    let network = Network::new("e");
    network.play(async {
        network.stand_ins().await;
        let _source = network.source(8446, Some(64)).await;
        network.start("vma");
        network.start("machine");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert_eq!(network.assign(&assignment(1, Some(1))).await, 204);
        // While the guest is loaded and woken, and after.
        let mut kills = 0;
        while kills < 3 {
            if let [pager] = network.pagers()[..] {
                kill(pager);
                kills += 1;
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        network.until("serving", MINUTE, |h| h.serving() == 1).await;
        let qemu = network.qemu();
        for pager in network.pagers() {
            kill(pager);
        }
        assert!(
            ask(network.slots()[0], 80).await.is_some(),
            "a guest hangs without its pager\n{}",
            network.log("machine")
        );
        network.until("the rest", MINUTE, |h| h.image().1).await;
        assert_eq!(network.qemu(), qemu, "the guest was resumed anew");
    });
}

#[test]
fn machine_a_source_that_is_lost_is_replaced_by_another_that_has_the_rest() {
    let network = Network::new("g");
    network.configure(&[8446, 8447], "");
    network.play(async {
        network.stand_ins().await;
        let first = network.source(8446, Some(16)).await;
        network.start("vma");
        network.start("machine");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        network.first_byte(&assignment(1, Some(1))).await;
        let qemu = network.qemu();
        first.abort();
        let _ = first.await;
        assert!(!network.heard(|h| h.image().1), "all of it had come before the source was lost");
        let _second = network.source(8447, None).await;
        network.until("the rest", MINUTE, |h| h.image().1).await;
        assert!(ask(network.slots()[0], 80).await.is_some());
        assert_eq!(network.qemu(), qemu, "the guest was resumed anew");
    });
}

#[test]
fn machine_a_guest_whose_memory_stops_coming_is_ended_and_that_is_said() {
    let network = Network::new("h");
    network.play(async {
        network.stand_ins().await;
        let source = network.source(8446, Some(16)).await;
        network.start("vma");
        network.start("machine");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        network.first_byte(&assignment(1, Some(1))).await;
        let qemu = network.qemu();
        source.abort();
        let _ = source.await;
        // What it has not touched yet does not come. Requests touch what was recorded of them; this looks at the kernel's
        // accounts of all memory.
        let agent = network.dir.path().join("m/cells/tiny-0/agent");
        let asking = tokio::spawn(async move { guest::kinds(&agent).await });
        network.until("leaving rotation", MINUTE, |h| h.slots().is_empty()).await;
        asking.abort();
        let began = Instant::now();
        while qemu.iter().any(|pid| network.qemu().contains(pid)) {
            assert!(began.elapsed() < MINUTE, "it stands still for ever\n{}", network.log("machine"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        network
            .until("the reason", MINUTE, |h| {
                let inventory = h.inventory.as_ref();
                let refused = inventory.and_then(|i| i.refused.get(&tiny()).cloned());
                let trouble = inventory.and_then(|i| i.instances.first().and_then(|i| i.trouble.clone()));
                refused
                    .into_iter()
                    .chain(trouble)
                    .any(|said| said.contains("no source") || said.contains("does not come"))
            })
            .await;
        // It comes back with its source.
        let _source = network.source(8446, None).await;
        network.until("serving again", MINUTE, |h| h.serving() == 1).await;
    });
}

#[test]
fn machine_an_address_in_use_is_said_with_what_to_do() {
    let network = Network::new("i");
    let said = netns::enter(&netns::path(&network.name), || {
        let _taken = std::net::TcpListener::bind("127.0.0.1:8441").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(vmatrix_vma_agent::run(&network.dir.path().join("vma.toml"))).unwrap_err().to_string()
    })
    .unwrap();
    assert!(said.contains("cannot listen on 127.0.0.1:8441") && said.contains("hint:"), "{said}");
}
