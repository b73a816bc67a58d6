//! Whose snapshots are believed, and what of a cell is a singleton's.

use super::{Network, instance, offered, spec, stage_whole};
use crate::machine::image::Known;
use crate::machine::singleton::{Held, Snapshot, trust};
use vmatrix_model::Digest;
use vmatrix_model::assignment::Singleton;
use vmatrix_model::manifest::{Manifest, PartKind, SignedManifest};
use vmatrix_vma_core::steps::{CellSpec, Life, Step};
use vmatrix_vma_core::tenure::Tenure;
use vmatrix_vma_image::machine::host;
use vmatrix_vma_image::sign;

#[test]
fn machine_a_snapshot_is_believed_by_its_digest_and_only_if_it_differs_in_what_a_guest_changes() {
    let network = Network::new("s");
    let (origin, other) = (network.store("origin"), network.store("other"));
    let host = host().unwrap();
    let signed = offered(&origin, &host, 1);
    let signers = [sign::public(&origin).unwrap()];
    let built = Known::trust("tiny", signed.clone(), &signers, &host).unwrap();
    let made = |change: &dyn Fn(&mut Manifest)| -> (SignedManifest, Snapshot) {
        let mut manifest = Manifest { parent: Some(built.digest), epoch: 7, ..built.manifest.clone() };
        manifest.name = "held-0123456789abcdef-1".to_owned();
        change(&mut manifest);
        let signed = sign::sign(&other, &manifest).unwrap();
        let digest = Digest::of(signed.manifest.as_bytes());
        (signed, Snapshot { digest, signer: sign::public(&other).unwrap() })
    };
    let changed = |m: &mut Manifest| m.device = m.memory.first;
    let (good, named) = made(&changed);
    assert_eq!(trust(good.clone(), &named, &built, &host).unwrap().digest, named.digest);

    let (another, _) = made(&|m| m.epoch = 8);
    assert!(trust(another, &named, &built, &host).unwrap_err().to_string().contains("in the place of"));
    let stranger = Snapshot { signer: signers[0].clone(), ..named.clone() };
    assert!(trust(good, &stranger, &built, &host).is_err(), "another signer than was named");
    let more: [&dyn Fn(&mut Manifest); 4] = [
        &|m| m.machine.append = "init=/bin/sh".to_owned(),
        &|m| m.guest.ports.push(22),
        &|m| m.recipe = Digest::of(b"other"),
        &|m| m.parts.retain(|p| p.kind != PartKind::Initrd),
    ];
    for change in more {
        let (bad, named) = made(change);
        let refused = trust(bad, &named, &built, &host).unwrap_err().to_string();
        assert!(refused.contains("differs in more"), "{refused}");
    }
}

#[test]
fn machine_a_singleton_that_is_held_is_no_replica_and_its_cell_stays_wherever_it_came_from() {
    let network = Network::new("h");
    let manifest = stage_whole(&network);
    let machine = network.machine();
    let built = machine.images.known("tiny").unwrap().digest;
    let one = |from| CellSpec { singleton: Some(from), ..spec(0) };
    network.block_on(async {
        machine.step(Step::Prepare(one(Singleton::Begin))).await.unwrap();
        let namespace = vmatrix_vma_image::netns::path(&machine.namespace(&instance(0)));
        let inode = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&namespace).unwrap());
        let before = inode();
        let service = instance(0).service;
        let held = Held {
            tenure: Tenure::first(),
            image: manifest.name.clone(),
            built,
            state: None,
            before: None,
            sources: vec![],
            taker: None,
        };
        machine.tenures.write(&service, &held).unwrap();
        machine.step(Step::Prepare(one(Singleton::Take("127.0.0.1:1".parse().unwrap())))).await.unwrap();
        assert_eq!(inode(), before, "the cell was built anew");
        let seen = machine.seen().cells;
        assert_eq!((seen[0].life, seen[0].holds), (Life::Ready, Some(0)));

        let refused = machine.step(Step::Prepare(spec(0))).await.unwrap_err();
        assert!(refused.problem.contains("held here as a singleton"), "{refused:?}");
        machine.step(Step::Release { instance: instance(0) }).await.unwrap();
        assert_eq!(machine.tenures.get(&service), Some(held), "it is not held any more");
    });
    assert_eq!(network.left(), Vec::<String>::new());
}
