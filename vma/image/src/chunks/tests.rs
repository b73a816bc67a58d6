use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    (dir, store)
}

/// Three chunks: bytes, zeros, and a short last one.
fn sample(dir: &Path) -> (PathBuf, Vec<u8>) {
    let mut bytes: Vec<u8> = (0..4096u32).map(|i| (i % 251) as u8).collect();
    bytes.extend([0; 4096]);
    bytes.extend([7; 100]);
    let file = dir.join("plain");
    std::fs::write(&file, &bytes).unwrap();
    (file, bytes)
}

#[test]
fn what_is_cut_comes_back_the_same_and_zeros_are_not_stored() {
    let (dir, store) = store();
    let (file, bytes) = sample(dir.path());
    let part = Cutter::new(&store, None).part(&file, PartKind::Disk, Bytes(4096)).unwrap();
    let chunks = table(&part, &store).unwrap();
    assert_eq!(chunks.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
    let back = dir.path().join("back");
    assemble(&part, &store, &back).unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), bytes);
}

#[test]
fn a_staged_part_is_for_its_owner_only_even_one_begun_open_to_all() {
    let (dir, store) = store();
    let (file, _) = sample(dir.path());
    let part = Cutter::new(&store, None).part(&file, PartKind::Disk, Bytes(4096)).unwrap();
    let (new, old) = (dir.path().join("new"), dir.path().join("old"));
    std::fs::write(&old, b"begun").unwrap();
    std::fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
    for path in [new, old] {
        assemble(&part, &store, &path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
}

#[test]
fn an_interrupted_staging_goes_on_from_what_is_whole() {
    let (dir, store) = store();
    let (file, bytes) = sample(dir.path());
    let part = Cutter::new(&store, None).part(&file, PartKind::Disk, Bytes(4096)).unwrap();
    let back = dir.path().join("back");
    let half = PartFile::create(&back, &part, table(&part, &store).unwrap()).unwrap();
    let (index, chunk) = half.missing()[0];
    half.put(index, &store.chunk(&chunk.digest).unwrap()).unwrap();
    assert!(matches!(half.finish(), Err(Error::Incomplete { missing: 1, total: 3, .. })));
    let rest = PartFile::create(&back, &part, table(&part, &store).unwrap()).unwrap();
    assert_eq!(rest.missing().iter().map(|(i, _)| *i).collect::<Vec<_>>(), [2]);
    drop(rest);
    // What a torn write left behind is fetched anew; what should be zeros is made zeros.
    let mut torn = bytes.clone();
    torn[17] ^= 1;
    torn[5000] = 9;
    std::fs::write(&back, &torn).unwrap();
    assert_eq!(PartFile::create(&back, &part, table(&part, &store).unwrap()).unwrap().missing().len(), 1);
    assemble(&part, &store, &back).unwrap();
    assert_eq!(std::fs::read(&back).unwrap(), bytes);
}

fn key(byte: u8) -> OwnerKey {
    OwnerKey::from_bytes([byte; 32])
}

#[test]
fn what_is_closed_opens_again_and_nothing_else_does() {
    let plain = vec![5; 4096];
    let (need, stored) = close(&plain, None).unwrap();
    assert_eq!(open(&stored, &need, None).unwrap(), plain);
    let refused = |stored: &[u8], need: Need| open(stored, &need, None).unwrap_err().to_string();
    assert!(refused(&stored, Need { digest: Digest::of(b"other"), ..need }).contains("another digest"));
    assert!(refused(&stored[1..], need).contains("cannot be unpacked"), "truncated");
    assert!(refused(&stored[..stored.len() - 1], need).contains("cannot be unpacked"), "truncated");
    let long = vec![0; plain.len() + STORED_MORE + 1];
    assert!(refused(&long, Need { stored: long.len() as u64, ..need }).contains("too many"));
    assert!(refused(&stored, Need { plain: 8192, ..need }).contains("holds 4096 bytes"));
    assert!(refused(&stored, Need { plain: 1 << 40, ..need }).contains("more than a chunk may hold"));
}

#[test]
fn what_another_zstd_packed_opens_too() {
    let plain: Vec<u8> = (0..60_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
    let (need, ours) = close(&plain, None).unwrap();
    let theirs = zstd::bulk::compress(&plain, 19).unwrap();
    assert_ne!(ours.len(), theirs.len());
    assert_eq!(open(&theirs, &need, None).unwrap(), plain);
    let (_dir, store) = store();
    assert!(!store.holds(&need));
    for (stored, holds) in [(&ours[..], true), (&theirs, true), (&theirs[..theirs.len() - 1], false)] {
        store.replace_chunk(&need.digest, stored).unwrap();
        assert_eq!(store.holds(&need), holds, "{} bytes", stored.len());
        // Nobody can look into one that is sealed: there the length has to be right.
        assert_eq!(store.holds(&Need { sealed: true, ..need }), stored.len() == ours.len());
    }
}

#[test]
fn a_sealed_chunk_opens_with_its_owners_key_only_and_its_name_tells_nothing() {
    let plain = vec![5; 4096];
    let (need, stored) = close(&plain, Some(&key(1))).unwrap();
    assert_eq!(open(&stored, &need, Some(&key(1))).unwrap(), plain);
    assert!(open(&stored, &need, Some(&key(2))).is_err());
    assert!(open(&stored, &need, None).unwrap_err().to_string().contains("owner's key"));
    assert_ne!(need.digest, Digest::of(&plain));
    assert_ne!(need.digest, close(&plain, Some(&key(2))).unwrap().0.digest);
    let mut torn = stored.clone();
    torn[40] ^= 1;
    assert!(open(&torn, &need, Some(&key(1))).is_err());
}

#[test]
fn a_zstd_bomb_never_gets_more_room_than_its_chunk() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
    assert!(bomb.len() < 16 << 10, "not much of a bomb");
    let need = Need { digest: Digest::of(b""), stored: bomb.len() as u64, plain: 4096, sealed: false };
    assert!(open(&bomb, &need, None).unwrap_err().to_string().contains("cannot be unpacked"));
}

#[test]
fn a_table_that_is_too_short_or_too_long_is_refused() {
    let (dir, store) = store();
    let (file, _) = sample(dir.path());
    let part = Cutter::new(&store, None).part(&file, PartKind::Disk, Bytes(4096)).unwrap();
    let plain = encode_table(&table(&part, &store).unwrap());
    for wrong in [&plain[..plain.len() - 1], &plain[..3], &[], &[plain.as_slice(), &[0]].concat()] {
        assert!(matches!(decode_table(&part, wrong), Err(Error::BadTable { .. })), "{} bytes", wrong.len());
    }
}

#[test]
fn machine_a_full_disk_is_named() {
    let full = Path::new("/dev/full");
    let file = OpenOptions::new().write(true).open(full).unwrap();
    let error = file.write_all_at(b"x", 0).map_err(io("write", full)).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("no space left to write /dev/full"));
}
