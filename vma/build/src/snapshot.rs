//! A guest that ran on from an image ─▶ a child image, of which only what changed is new.
//!
//! ```text
//! memory file + unchanged(page) ─▶ packs of what changed  ┐
//! the parent's tables ─▶ its packs, for everything else   ┼▶ signed manifest: parent, epoch + 1
//! device state ─▶ one blob                                │
//! data's file + written chunks ─▶ its part; the others,   │
//! what is only read, and the kernel: the parent's         ┘
//! ```
//! Memory, device state and data are of one moment: the guest stands still, and its disks were flushed.
//!
//! The child's tables name all of its packs, also those that only the parent's holders have: whoever resumes it needs
//! no parent, and does not fetch what it has.

use std::fs;
use std::path::Path;
use vmatrix_model::Digest;
use vmatrix_model::manifest::{Manifest, PartKind};
use vmatrix_vma_image::chunks::Cutter;
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::memory::{self, Map, Parent};
use vmatrix_vma_image::seal::OwnerKey;
use vmatrix_vma_image::{Store, sign};

/// What a child is made from. The guest stands still, and its device state is of the same moment as its memory.
pub struct Child<'a> {
    /// Under which the child is put: the parent's to follow it, another to stand beside it.
    pub name: &'a str,
    /// The guest's memory; pages that never arrived may be missing.
    pub memory: &'a Path,
    /// Device state, as QEMU saved it.
    pub device: &'a Path,
    /// The image it ran on from, and its digest.
    pub parent: (&'a Manifest, Digest),
    /// Where the parent has its pages; complete.
    pub map: &'a Map,
    /// Whether a page is as the parent has it. It must be true of every page that is not in the file, and may be
    /// false of a page that only might have changed.
    pub unchanged: &'a (dyn Fn(u32) -> bool + Sync),
    /// Pages in the order in which the child is expected to touch them; see [`order`].
    pub order: &'a [u32],
    /// The owner's key, where the parent is sealed.
    pub key: Option<&'a OwnerKey>,
    /// What the guest wrote of the image's data; without it the child has the parent's.
    pub data: Option<Data<'a>>,
}

/// What a guest wrote of its data.
#[derive(Debug, Clone, Copy)]
pub struct Data<'a> {
    /// The disk's file; chunks that were not written may be missing.
    pub file: &'a Path,
    /// Chunks that may differ from the parent's, by index.
    pub written: &'a [u32],
}

/// The working set of an image, in order: where its child begins too, for its pages stay where they are.
pub fn order(map: &Map) -> Vec<u32> {
    let packs = map.packs().iter().take(map.working_set());
    packs.flat_map(|pack| pack.pages().map(|(_, page)| page)).collect()
}

/// Puts the child into the store, signed by it; returns the manifest and its digest.
///
/// # Errors
/// The key is not the parent's, memory or data are of another size, the parent has no data or its table is not in the
/// store, or the store is full: then nothing is left in it.
pub fn snapshot(store: &Store, child: &Child) -> Result<(Manifest, Digest)> {
    let (parent, parent_digest) = child.parent;
    let bad = |problem: &str| Error::BadManifest { name: parent.name.clone(), problem: problem.to_owned() };
    if parent.seal != child.key.map(OwnerKey::id) {
        return Err(bad("a snapshot of it must be sealed with the same key"));
    }
    let size = fs::metadata(child.memory).map_err(io("look at", child.memory))?.len();
    if size != parent.memory.size.0 || !child.map.is_complete() {
        return Err(bad("what is to be a snapshot of it has memory of another size, or its map is not complete"));
    }
    // Until the manifest is there: nobody else's image can have come to need what is taken out again.
    let _alone = store.lock()?;
    let cutter = Cutter::new(store, child.key);
    let put = put(store, &cutter, child, parent, parent_digest);
    if put.is_err() {
        cutter.undo();
    }
    put
}

fn put(store: &Store, cutter: &Cutter, child: &Child, parent: &Manifest, digest: Digest) -> Result<(Manifest, Digest)> {
    let requests = parent.memory.working_set.requests;
    let from = Parent { map: child.map, unchanged: child.unchanged };
    let memory = memory::cut(cutter, child.memory, child.order, requests, Some(&from))?;
    let device = fs::read(child.device).map_err(io("read", child.device))?;
    let mut parts = parent.parts.clone();
    if let Some(data) = child.data {
        let no_data = || Error::BadManifest { name: parent.name.clone(), problem: "it has no data".to_owned() };
        let part = parts.iter_mut().find(|part| part.kind == PartKind::Data).ok_or_else(no_data)?;
        *part = cutter.changed(part, data.file, data.written)?;
    }
    let manifest = Manifest {
        name: child.name.to_owned(),
        parent: Some(digest),
        epoch: parent.epoch + 1,
        memory,
        device: cutter.blob(&device, true)?,
        parts,
        ..parent.clone()
    };
    let signed = sign::sign(store, &manifest)?;
    store.put_image(&manifest.name, &signed)?;
    Ok((manifest, Digest::of(signed.manifest.as_bytes())))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vmatrix_model::Bytes;
    use vmatrix_model::manifest::{Chunk, Part};
    use vmatrix_vma_image::chunks::{self, DATA_CHUNK, DISK_CHUNK};
    use vmatrix_vma_image::inspect;

    const PAGES: u32 = (64 << 20) / 4096;
    /// Of the data's file: five chunks, the third of zeros, the last one short.
    const DATA_SIZE: u64 = (4 << 16) + 8192;

    pub(crate) struct Image {
        pub dir: tempfile::TempDir,
        pub store: Store,
        pub key: OwnerKey,
        pub manifest: Manifest,
        pub digest: Digest,
    }

    /// 64 MiB of memory: four MiB of text at 16 MiB, the first of its pages in the working set.
    pub(crate) fn image() -> Image {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let key = OwnerKey::from_bytes([7; 32]);
        key.write(inspect::key_path(store.dir(), &key.id())).unwrap();
        let memory = fs::File::create_new(dir.path().join("memory")).unwrap();
        memory.set_len(u64::from(PAGES) * 4096).unwrap();
        for page in 4096..5120u32 {
            memory.write_all_at(page.to_string().repeat(400).as_bytes(), u64::from(page) * 4096).unwrap();
        }
        fs::write(dir.path().join("device"), "device state").unwrap();
        let data: Vec<u8> = (0..DATA_SIZE).map(|i| if i >> 16 == 2 { 0 } else { (i / 99) as u8 }).collect();
        fs::write(dir.path().join("data"), data).unwrap();
        let cutter = Cutter::new(&store, Some(&key));
        let part = |kind| -> Part { cutter.part(&dir.path().join("device"), kind, DISK_CHUNK).unwrap() };
        let manifest = Manifest {
            seal: Some(key.id()),
            memory: memory::cut(&cutter, &dir.path().join("memory"), &[4097, 4096], 60, None).unwrap(),
            device: cutter.blob(b"device state", true).unwrap(),
            parts: [PartKind::Disk, PartKind::Kernel, PartKind::Initrd]
                .map(part)
                .into_iter()
                .chain([cutter.part(&dir.path().join("data"), PartKind::Data, DATA_CHUNK).unwrap()])
                .collect(),
            ..vmatrix_vma_testing::manifest("tiny", 64, &[PartKind::Disk, PartKind::Data])
        };
        let signed = sign::sign(&store, &manifest).unwrap();
        store.put_image("tiny", &signed).unwrap();
        Image { dir, store, key, manifest, digest: Digest::of(signed.manifest.as_bytes()) }
    }

    #[test]
    fn a_child_is_what_changed_and_reads_back_whole() {
        let image = image();
        let path = image.dir.path().join("memory");
        let map = memory::map(&image.manifest, &image.store).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[9; 4096], 4097 * 4096).unwrap();
        file.write_all_at(&[8; 4096], 100 * 4096).unwrap();
        file.write_all_at(&[0; 4096], 5000 * 4096).unwrap();
        let changed = [4097, 100, 5000];
        let child = Child {
            name: "tiny",
            memory: &path,
            device: &image.dir.path().join("device"),
            parent: (&image.manifest, image.digest),
            map: &map,
            unchanged: &|page| !changed.contains(&page),
            order: &order(&map),
            key: Some(&image.key),
            data: None,
        };
        let (manifest, digest) = snapshot(&image.store, &child).unwrap();
        assert_eq!((manifest.parent, manifest.epoch), (Some(image.digest), 1));
        assert_eq!(manifest.memory.parent_pages, 1024 - 2, "pages that did not change are stored again");
        assert_eq!(manifest.memory.zero_pages, u64::from(PAGES) - 1024);
        let (read, again) =
            sign::verify(&image.store.image("tiny").unwrap().unwrap(), &[sign::public(&image.store).unwrap()]).unwrap();
        assert_eq!((&read, again), (&manifest, digest));
        let new: u64 = {
            let before: std::collections::BTreeSet<_> = map.packs().iter().map(|p| p.digest).collect();
            let after = memory::map(&manifest, &image.store).unwrap();
            after.packs().iter().filter(|p| !before.contains(&p.digest)).map(|p| u64::from(p.stored)).sum()
        };
        assert!(new < 1024, "{new} bytes are new for two pages of one byte each");
        let whole = image.dir.path().join("whole");
        memory::assemble(&manifest, &image.store, Some(&image.key), &whole).unwrap();
        assert!(fs::read(&whole).unwrap() == fs::read(&path).unwrap(), "other memory comes back");
    }

    fn data(manifest: &Manifest, store: &Store) -> Vec<Option<Chunk>> {
        chunks::table(manifest.part(PartKind::Data).unwrap(), store).unwrap()
    }

    /// The data of an image, as a machine lays it out.
    fn assembled(image: &Image, manifest: &Manifest) -> Vec<u8> {
        let to = image.dir.path().join("assembled");
        chunks::assemble(manifest.part(PartKind::Data).unwrap(), &image.store, &to).unwrap();
        fs::read(to).unwrap()
    }

    #[test]
    fn of_data_only_what_was_written_is_new_and_a_child_of_a_child_has_both() {
        let image = image();
        let [path, memory, device] = ["data", "memory", "device"].map(|name| image.dir.path().join(name));
        let map = memory::map(&image.manifest, &image.store).unwrap();
        let child = |parent, file, written| Child {
            name: "tiny",
            memory: &memory,
            device: &device,
            parent,
            map: &map,
            unchanged: &|_| true,
            order: &[],
            key: Some(&image.key),
            data: Some(Data { file, written }),
        };
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        file.write_all_at(b"in zeros", (2 << 16) + 5).unwrap();
        file.write_all_at(&[0; 8192], 4 << 16).unwrap();
        let whole = fs::read(&path).unwrap();
        // As a pager keeps it: what nobody read is not there.
        file.write_all_at(&[0; 1 << 16], 1 << 16).unwrap();
        let (first, digest) =
            snapshot(&image.store, &child((&image.manifest, image.digest), &path, &[2, 3, 4])).unwrap();
        let (before, after) = (data(&image.manifest, &image.store), data(&first, &image.store));
        assert_eq!(before[..2], after[..2]);
        assert_eq!(before[3], after[3], "written with what it held");
        assert!(before[2].is_none() && after[2].is_some() && before[4].is_some() && after[4].is_none());
        assert!(assembled(&image, &first) == whole, "other data comes back");
        assert_eq!(first.part(PartKind::Disk), image.manifest.part(PartKind::Disk));

        file.write_all_at(b"later", 7).unwrap();
        let (second, _) = snapshot(&image.store, &child((&first, digest), &path, &[0])).unwrap();
        let expected = [&whole[..7], b"later".as_slice(), &whole[12..]].concat();
        assert!(assembled(&image, &second) == expected, "the first child's writes are lost");
        assert_eq!((second.epoch, second.parent), (2, Some(digest)));
        let new =
            |table: Vec<Option<Chunk>>, than: &[Option<Chunk>]| table.iter().zip(than).filter(|(a, b)| a != b).count();
        assert_eq!(new(data(&second, &image.store), &after), 1);
        inspect::verify(image.store.dir(), "tiny", &[]).unwrap();
    }

    #[test]
    fn data_that_the_parent_does_not_have_makes_no_child_and_leaves_nothing_behind() {
        let image = image();
        let memory = image.dir.path().join("memory");
        let map = memory::map(&image.manifest, &image.store).unwrap();
        let mut without = image.manifest.clone();
        without.parts.retain(|part| part.kind != PartKind::Data);
        let chunks = || {
            let folders = fs::read_dir(image.store.dir().join("chunks")).unwrap().map(|entry| entry.unwrap().path());
            folders.map(|folder| fs::read_dir(folder).map_or(1, Iterator::count)).sum::<usize>()
        };
        let (data, before) = (image.dir.path().join("data"), chunks());
        for (parent, file, written, why) in [
            (&without, &data, 0, "no data"),
            (&image.manifest, &memory, 0, "has 67108864 bytes"),
            (&image.manifest, &data, 5, "none is 5"),
        ] {
            let child = Child {
                name: "tiny",
                memory: &memory,
                device: &image.dir.path().join("device"),
                parent: (parent, image.digest),
                map: &map,
                unchanged: &|_| true,
                order: &[],
                key: Some(&image.key),
                data: Some(Data { file, written: &[written] }),
            };
            let said = snapshot(&image.store, &child).unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
            assert_eq!(chunks(), before);
        }
    }

    #[test]
    fn another_key_or_another_size_makes_no_child() {
        let image = image();
        let map = memory::map(&image.manifest, &image.store).unwrap();
        let path = image.dir.path().join("memory");
        let child = |key| Child {
            name: "tiny",
            memory: &path,
            device: &path,
            parent: (&image.manifest, image.digest),
            map: &map,
            unchanged: &|_| true,
            order: &[],
            key,
            data: None,
        };
        let other = OwnerKey::from_bytes([8; 32]);
        for key in [None, Some(&other)] {
            assert!(snapshot(&image.store, &child(key)).unwrap_err().to_string().contains("same key"));
        }
        fs::File::options().write(true).open(&path).unwrap().set_len(Bytes(32 << 20).0).unwrap();
        assert!(snapshot(&image.store, &child(Some(&image.key))).unwrap_err().to_string().contains("another size"));
    }
}
