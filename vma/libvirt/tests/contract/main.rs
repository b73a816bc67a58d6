//! What every hypervisor does for a machine: one suite, run on QEMU started directly and on libvirt.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod facts;
mod guest;
mod paged;
mod world;

use guest::Guest;
use vmatrix_vma_libvirt::Hypervisor;
use world::{Direct, Under, World};

#[tokio::test(flavor = "multi_thread")]
async fn machine_direct_qemu_keeps_the_contract_of_clones() {
    let guest = Guest::get().await;
    facts::of_clones(&World::new(&guest, Direct::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_libvirt_keeps_the_contract_of_clones() {
    let guest = Guest::get().await;
    facts::of_clones(&World::new(&guest, Under::start().await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_shared_vm_is_saved_again_by_direct_qemu_and_goes_on() {
    let guest = Guest::get().await;
    facts::a_shared_vm_is_saved_and_goes_on_where_it_was(&World::new(&guest, Direct::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_shared_vm_is_saved_again_by_libvirt_and_goes_on() {
    let guest = Guest::get().await;
    facts::a_shared_vm_is_saved_and_goes_on_where_it_was(&World::new(&guest, Under::start().await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_an_image_saved_by_either_is_resumed_by_the_other() {
    let guest = Guest::get().await;
    let direct = World::new(&guest, Direct::new());
    let under = World::new(&guest, Under::start().await);
    let saved = facts::boot_and_save(&direct, "by-direct").await;
    facts::resume(&under, "under-libvirt", &saved).await;
    let saved = facts::boot_and_save(&under, "by-libvirt").await;
    facts::resume(&direct, "under-direct", &saved).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_vm_outlives_libvirts_daemon_and_is_driven_by_the_next() {
    let guest = Guest::get().await;
    let world = World::new(&guest, Under::start().await);
    let cell = world.cell("next");
    let vm = facts::wake(&world, &cell, "stays", &guest.files, world::CLONE).await;
    world.backend.kill_daemon().await;
    assert_eq!(world.hypervisor().find("stays").await.unwrap(), Some(vm.clone()), "the VM went with the daemon");
    facts::answers(&world, &cell).await;
    world.hypervisor().cont(&vm).await.expect("the next daemon knows the domain");
    world.hypervisor().quit("stays").await.unwrap();
    assert_eq!(world.hypervisor().find("stays").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_the_pager_serves_a_vm_under_either() {
    let guest = Guest::get().await;
    paged::resume(&World::new(&guest, Direct::new())).await;
    paged::resume(&World::new(&guest, Under::start().await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_libvirts_vms_are_each_a_user_of_their_own() {
    let guest = Guest::get().await;
    let world = World::new(&guest, Under::start().await);
    let (one, two) = (world.cell("one"), world.cell("two"));
    let first = world.spawn(&one, "first", &guest.files, world::CLONE).await.unwrap();
    let second = world.spawn(&two, "second", &guest.files, world::CLONE).await.unwrap();
    let owner = |pid: i32| std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(format!("/proc/{pid}")).unwrap());
    assert_ne!(owner(first.pid), owner(second.pid));
    for name in ["first", "second"] {
        world.hypervisor().quit(name).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn machine_a_domain_of_somebody_else_is_left_alone() {
    let guest = Guest::get().await;
    let world = World::new(&guest, Under::start().await);
    let cell = world.cell("mine");
    let vm = world.spawn(&cell, "mine", &guest.files, world::CLONE).await.unwrap();
    let folder = guest::folder();
    let other = world.backend.elsewhere(folder.path()).await;
    assert_eq!(other.find("mine").await.unwrap(), None, "a VM was taken for one of another folder");
    other.quit("mine").await.expect("there is nothing to end");
    assert_eq!(world.hypervisor().find("mine").await.unwrap(), Some(vm), "somebody else's VM was ended");
    world.hypervisor().quit("mine").await.unwrap();
}
