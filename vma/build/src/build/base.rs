//! The operating system that several services stand on.
//!
//! ```text
//! base/NAME.toml ─packages─▶ root ─▶ disk (the same bytes every time) + a list of what is on it ─kept─▶ cache
//! ```
//! Every image on a base has this very disk as a part, so whoever has one of them has it for all.

use super::tree::Tree;
use super::{ext4, root};
use crate::recipe::{Hashed, are_packages, beside, is_label};
use crate::workshop::Scratch;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use vmatrix_model::Digest;
use vmatrix_model::config::parse_toml;
use vmatrix_vma_image::error::{Error, Result, io};

/// Rises when the same recipe makes other bytes.
const MAKER: u32 = 1;
/// Disks of bases that are kept, some 80 MB each: of those that are built on now, and one or two before.
const KEPT: usize = 4;

/// What its owner writes. Unknown keys are errors.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseRecipe {
    /// One sentence for people.
    pub about: String,
    /// The Debian release: `bookworm`.
    pub release: String,
    /// Packages beside the essential ones; their dependencies come with them, recommendations do not.
    pub packages: Vec<String>,
    /// Paths (dpkg globs) that are left out of the packages, also of those of a service on it.
    #[serde(default)]
    pub exclude: Vec<String>,
}

/// A base that recipes stand on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    pub recipe: BaseRecipe,
    /// Of the recipe's text and what makes it a disk.
    pub digest: Digest,
}

/// A base that was made.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its disk; nobody writes it.
    pub disk: PathBuf,
    /// What is on it.
    pub tree: Tree,
}

impl Base {
    /// Reads the base `name` of the recipe in `file`.
    ///
    /// # Errors
    /// There is none of that name, or it is not right.
    pub fn read(file: &Path, name: &str) -> Result<Base> {
        let file = beside(file, &Path::new("base").join(format!("{name}.toml")));
        let text = fs::read_to_string(&file).map_err(io("read base", &file))?;
        let recipe: BaseRecipe = parse_toml(&file.display().to_string(), &text)?;
        let bad = |problem: String| Error::BadRecipe { file: file.clone(), problem };
        if !is_label(&recipe.release) {
            return Err(bad(format!("release = {:?} is not the name of a Debian release", recipe.release)));
        }
        are_packages(recipe.packages.iter()).map_err(bad)?;
        let mut digest = Hashed::default();
        digest.add(text.as_bytes());
        digest.add(format!("{MAKER} {}", ext4::MADE).as_bytes());
        Ok(Base { recipe, digest: digest.end() })
    }

    /// Finds the base in `cache`, or makes it there.
    ///
    /// # Errors
    /// A package that there is not, a program that fails, a full disk; nothing is left behind.
    pub fn get(&self, cache: &Path) -> Result<Made> {
        let bases = cache.join("bases");
        fs::create_dir_all(&bases).map_err(io("create", &bases))?;
        let folder = bases.join(self.digest.to_string());
        if !folder.is_dir() {
            let fresh = Scratch::within(&bases, &self.digest.short().to_string())?;
            let (root, made) = (fresh.file("root"), fresh.file("made"));
            root::bootstrap(&root::Packages::of(Some(self), None), &root, cache)?;
            fs::create_dir(&made).map_err(io("create", &made))?;
            ext4::of(&root, &made.join("disk"))?;
            let tree = Tree::read(&root)?.digested(&root)?;
            let list = made.join("list.json");
            let text = serde_json::to_string(&tree).map_err(|e| io("write", &list)(e.into()))?;
            fs::write(&list, text).map_err(io("write", &list))?;
            match fs::rename(&made, &folder) {
                // Another build was faster.
                Err(_) if folder.is_dir() => {}
                renamed => renamed.map_err(io("rename into", &folder))?,
            }
            forget(&bases, &folder);
        }
        let list = folder.join("list.json");
        let text = fs::read_to_string(&list).map_err(io("read", &list))?;
        let tree = serde_json::from_str(&text).map_err(|e| io("understand", &list)(e.into()))?;
        Ok(Made { disk: folder.join("disk"), tree })
    }
}

/// Removes the oldest, so that [`KEPT`] stay; `but` stays in any case.
fn forget(bases: &Path, but: &Path) {
    let entries = fs::read_dir(bases).into_iter().flatten().flatten();
    let visible = entries.filter(|e| !e.file_name().to_string_lossy().starts_with('.') && e.path() != but);
    let made = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let mut others: Vec<PathBuf> = visible.map(|e| e.path()).collect();
    others.sort_by_key(|path| std::cmp::Reverse(made(path)));
    for old in others.iter().skip(KEPT - 1) {
        if let Err(error) = fs::remove_dir_all(old) {
            tracing::warn!(path = %old.display(), %error, "an old base stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_that_is_not_there_or_not_right_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("r.toml");
        let error = Base::read(&recipe, "none").unwrap_err().to_string();
        assert!(error.contains("base/none.toml"), "{error}");
        fs::create_dir(dir.path().join("base")).unwrap();
        let good = "about = \"x\"\nrelease = \"bookworm\"\npackages = [\"nginx-light\"]\n";
        let read = |text: String| {
            fs::write(dir.path().join("base/b.toml"), text).unwrap();
            Base::read(&recipe, "b")
        };
        let digest = read(good.to_owned()).unwrap().digest;
        assert_ne!(read(format!("# other\n{good}")).unwrap().digest, digest);
        for (from, to, says) in [
            ("bookworm", "../x", "not the name of a Debian release"),
            ("nginx-light", "--x", "not the name of a Debian package"),
        ] {
            let error = read(good.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("b.toml"), "{error}");
        }
    }

    #[test]
    fn of_many_bases_the_newest_stay() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<PathBuf> = (0..7).map(|n| dir.path().join(format!("base{n}"))).collect();
        for (n, path) in names.iter().enumerate() {
            fs::create_dir(path).unwrap();
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 - n as u64);
            fs::File::open(path).unwrap().set_modified(at).unwrap();
        }
        forget(dir.path(), &names[6]);
        let left: Vec<bool> = names.iter().map(|path| path.exists()).collect();
        assert_eq!(left, [true, true, true, false, false, false, true]);
    }
}
