//! What is in a folder, thing by thing; and what of it is not in another already.
//!
//! ```text
//! root ─read─▶ Tree (path ▶ kind, owner, mode, size)   ─digests─▶ a list that can be kept (JSON)
//! service's root, base's list ─over─▶ a layer: what is new or changed, and a whiteout for what is gone
//! ```
//! Mounted over the base by overlayfs, the layer is the service's root again.

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, mknod};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{self, Metadata, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use vmatrix_model::Digest;
use vmatrix_vma_image::error::{Error, Result, io};

/// Deepest folder and most things of a root file system; more of them are no service's.
const DEPTH_MAX: usize = 64;
const ENTRIES_MAX: usize = 2_000_000;
const CAPABILITY: &CStr = c"security.capability";
/// Of its newest form, 24 bytes.
const CAPABILITY_MAX: usize = 64;

/// Everything below a folder, by its path from there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    pub entries: BTreeMap<PathBuf, Entry>,
}

/// One thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Kind and rights, as `stat` has them.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since the epoch.
    #[serde(skip)]
    pub mtime: u64,
    /// What a program gains that is started from it (`setcap`), as the kernel keeps it; empty for nearly all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capability: Vec<u8>,
    pub content: Content,
    /// Names of the same file, and which file that is.
    #[serde(skip)]
    pub names: u64,
    #[serde(skip)]
    pub file: (u64, u64),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    Folder,
    File {
        size: u64,
        /// Only in a list that is kept.
        digest: Option<Digest>,
    },
    /// Where it leads.
    Link(PathBuf),
    /// Its number.
    Device(u64),
}

impl Tree {
    /// Looks at everything below `root`, on no other file system. What a program waits at (a pipe, a socket) is left
    /// out: it is made anew by whoever waits there.
    ///
    /// # Errors
    /// Something cannot be read.
    pub fn read(root: &Path) -> Result<Tree> {
        let mut tree = Tree::default();
        tree.add(root, Path::new(""), 0)?;
        Ok(tree)
    }

    fn add(&mut self, root: &Path, folder: &Path, depth: usize) -> Result<()> {
        let at = root.join(folder);
        let mut names = Vec::new();
        for entry in fs::read_dir(&at).map_err(io("list", &at))? {
            names.push(entry.map_err(io("list", &at))?.file_name());
        }
        names.sort();
        if depth > DEPTH_MAX || self.entries.len() + names.len() > ENTRIES_MAX {
            let said = format!("it has more than {ENTRIES_MAX} things, or folders in each other {DEPTH_MAX} deep");
            return Err(Error::Tool { what: format!("looking at {}", at.display()), status: "given up".into(), said });
        }
        for name in names {
            let path = folder.join(name);
            let full = root.join(&path);
            let meta = fs::symlink_metadata(&full).map_err(io("look at", &full))?;
            let Some(content) = content(&full, &meta)? else { continue };
            let is_folder = content == Content::Folder;
            let capability = if meta.is_file() { capability(&full)? } else { Vec::new() };
            self.entries.insert(path.clone(), Entry::new(&meta, content, capability));
            if is_folder {
                self.add(root, &path, depth + 1)?;
            }
        }
        Ok(())
    }

    /// Digests every file, so that the list says what is in them.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn digested(mut self, root: &Path) -> Result<Tree> {
        for (path, entry) in &mut self.entries {
            if let Content::File { digest, .. } = &mut entry.content {
                *digest = Some(digest_of(&root.join(path))?);
            }
        }
        Ok(self)
    }
}

impl Entry {
    fn new(meta: &Metadata, content: Content, capability: Vec<u8>) -> Entry {
        Entry {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: u64::try_from(meta.mtime()).unwrap_or(0),
            capability,
            content,
            names: meta.nlink(),
            file: (meta.dev(), meta.ino()),
        }
    }

    /// Whether a thing at `path` is this one of the base. When it was made does not matter.
    fn is(&self, base: &Entry, path: &Path) -> Result<bool> {
        let about = |e: &Entry| (e.mode, e.uid, e.gid, e.capability.clone());
        if about(self) != about(base) {
            return Ok(false);
        }
        match (&self.content, &base.content) {
            (Content::File { size, .. }, Content::File { size: known, digest: Some(digest) }) => {
                Ok(size == known && digest_of(path)? == *digest)
            }
            (ours, theirs) => Ok(ours == theirs),
        }
    }
}

fn content(path: &Path, meta: &Metadata) -> Result<Option<Content>> {
    let kind = meta.file_type();
    Ok(if kind.is_dir() {
        Some(Content::Folder)
    } else if kind.is_file() {
        Some(Content::File { size: meta.len(), digest: None })
    } else if kind.is_symlink() {
        Some(Content::Link(fs::read_link(path).map_err(io("read", path))?))
    } else if kind.is_char_device() || kind.is_block_device() {
        Some(Content::Device(meta.rdev()))
    } else {
        None
    })
}

/// The one extended attribute that packages have.
fn capability(path: &Path) -> Result<Vec<u8>> {
    let bad = |e: std::io::Error| io("read the capabilities of", path)(e);
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| bad(e.into()))?;
    let mut value = [0u8; CAPABILITY_MAX];
    // SAFETY: both names end with a zero byte, and `value` has as many bytes as are said.
    #[allow(unsafe_code)]
    let length =
        unsafe { nix::libc::lgetxattr(name.as_ptr(), CAPABILITY.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    match (usize::try_from(length), Errno::last()) {
        (Ok(length), _) => Ok(value.get(..length).unwrap_or_default().to_vec()),
        (Err(_), Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(Vec::new()),
        (Err(_), other) => Err(bad(other.into())),
    }
}

fn digest_of(path: &Path) -> Result<Digest> {
    fs::read(path).map(|bytes| Digest::of(&bytes)).map_err(io("read", path))
}

/// Lays into the empty folder `layer` what `root` has that the base has not, and a whiteout wherever the base has
/// something that `root` has not. Files are other names of the root's.
///
/// # Errors
/// Something cannot be read or made.
pub fn over(root: &Path, base: &Tree, layer: &Path) -> Result<()> {
    let tree = Tree::read(root)?;
    let mut own: Vec<(&PathBuf, &Entry)> = Vec::new();
    for (path, entry) in &tree.entries {
        let same = match base.entries.get(path) {
            Some(known) => entry.is(known, &root.join(path))?,
            None => false,
        };
        if !same {
            own.push((path, entry));
        }
    }
    // Where the folder itself is gone, or is no folder any more, that hides what was in it.
    let gone = base.entries.keys().filter(|path| !tree.entries.contains_key(*path)).filter(|path| {
        let parent = path.parent().filter(|p| *p != Path::new(""));
        parent.is_none_or(|p| tree.entries.get(p).is_some_and(|e| e.content == Content::Folder))
    });
    for (path, entry) in own {
        above(&tree, path, layer)?;
        let to = layer.join(path);
        match entry.content {
            Content::Folder => folder(entry, &to)?,
            _ => fs::hard_link(root.join(path), &to).map_err(io("link", &to))?,
        }
    }
    for path in gone {
        above(&tree, path, layer)?;
        let to = layer.join(path);
        mknod(&to, SFlag::S_IFCHR, Mode::empty(), 0).map_err(|e| io("make", &to)(e.into()))?;
    }
    Ok(())
}

/// Makes the folders above `path`, each as it is in the root: what they are is what the topmost layer says.
fn above(tree: &Tree, path: &Path, layer: &Path) -> Result<()> {
    let mut above: Vec<&Path> = path.ancestors().skip(1).filter(|p| *p != Path::new("")).collect();
    above.reverse();
    for path in above {
        if let Some(entry) = tree.entries.get(path) {
            folder(entry, &layer.join(path))?;
        }
    }
    Ok(())
}

fn folder(entry: &Entry, to: &Path) -> Result<()> {
    if to.is_dir() {
        return Ok(());
    }
    fs::create_dir(to).map_err(io("create", to))?;
    lchown(to, Some(entry.uid), Some(entry.gid)).map_err(io("give away", to))?;
    fs::set_permissions(to, Permissions::from_mode(entry.mode & 0o7777)).map_err(io("set the mode of", to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn lay(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    fn listed(layer: &Path) -> Vec<String> {
        Tree::read(layer).unwrap().entries.keys().map(|p| p.display().to_string()).collect()
    }

    #[test]
    fn a_layer_has_what_is_new_and_changed_and_a_whiteout_for_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let [base, root, layer] = ["base", "root", "layer"].map(|name| dir.path().join(name));
        let same =
            [("etc/same", "1"), ("usr/lib/a", "2"), ("usr/lib/b", "3"), ("opt/all/x", "4"), ("was/a/folder", "5")];
        lay(&base, &same);
        lay(&root, &same);
        lay(&root, &[("usr/lib/b", "changed"), ("srv/new", "6")]);
        symlink("same", base.join("etc/link")).unwrap();
        symlink("other", root.join("etc/link")).unwrap();
        fs::remove_file(root.join("etc/same")).unwrap();
        fs::remove_dir_all(root.join("opt/all")).unwrap();
        fs::remove_dir_all(root.join("was")).unwrap();
        fs::write(root.join("was"), "a file now").unwrap();
        fs::set_permissions(root.join("usr/lib/a"), Permissions::from_mode(0o600)).unwrap();
        fs::create_dir(&layer).unwrap();
        let known = Tree::read(&base).unwrap().digested(&base).unwrap();
        over(&root, &known, &layer).expect("needs root, to make whiteouts");
        let there = [
            "etc",
            "etc/link",
            "etc/same",
            "opt",
            "opt/all",
            "srv",
            "srv/new",
            "usr",
            "usr/lib",
            "usr/lib/a",
            "usr/lib/b",
        ];
        assert_eq!(listed(&layer), [&there[..], &["was"]].concat());
        let whiteouts: Vec<PathBuf> = Tree::read(&layer)
            .unwrap()
            .entries
            .into_iter()
            .filter_map(|(path, e)| (e.content == Content::Device(0)).then_some(path))
            .collect();
        assert_eq!(whiteouts, [Path::new("etc/same"), Path::new("opt/all")]);
    }

    #[test]
    fn a_folder_with_other_rights_is_in_the_layer_by_itself_and_what_is_in_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let [base, root, layer] = ["base", "root", "layer"].map(|name| dir.path().join(name));
        for at in [&base, &root] {
            lay(at, &[("var/log/nginx/access", "")]);
        }
        fs::set_permissions(root.join("var/log/nginx"), Permissions::from_mode(0o700)).unwrap();
        fs::create_dir(&layer).unwrap();
        over(&root, &Tree::read(&base).unwrap().digested(&base).unwrap(), &layer).unwrap();
        assert_eq!(listed(&layer), ["var", "var/log", "var/log/nginx"]);
        let mode = fs::metadata(layer.join("var/log/nginx")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o700);
    }

    #[test]
    fn a_list_that_was_kept_is_the_list_again() {
        let dir = tempfile::tempdir().unwrap();
        lay(dir.path(), &[("a/b", "text"), ("c", "")]);
        let tree = Tree::read(dir.path()).unwrap().digested(dir.path()).unwrap();
        let kept: Tree = serde_json::from_str(&serde_json::to_string(&tree).unwrap()).unwrap();
        let known =
            |t: &Tree| t.entries.iter().map(|(p, e)| (p.clone(), e.content.clone(), e.mode)).collect::<Vec<_>>();
        assert_eq!(known(&kept), known(&tree));
    }
}
