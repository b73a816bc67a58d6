//! Recipe ─▶ root file system: the application's packages with their dependencies, nothing else.

use super::base::Base;
use super::ext4::MADE;
use super::tools::{copy, inside, reason, run};
use crate::recipe::{Extract, Recipe, beside};
use crate::workshop::Scratch;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use vmatrix_vma_image::error::{Error, Result, io};

/// The Debian release of a guest that stands on no base.
const SUITE: &str = "bookworm";
/// What no service reads (SODA's tailoring): documentation, translations.
const NEVER: [&str; 6] = [
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
];
/// The guest agent, which is the guest's first process.
pub const AGENT: &str = "/sbin/vmatrix-vma-guest";
/// Says where the disk that the guest writes is mounted, if it has one.
pub const DATA: &str = "/etc/vmatrix/data";

const SSHD: &str = "/usr/sbin/sshd";
/// Run by the guest agent in every clone; a recipe adds its own beside it.
const SSH_HOOK: &str = "/etc/vmatrix/awake.d/50-ssh";
/// Ed25519 alone: an RSA key takes seconds to make, and nobody waits for one.
const NEW_HOST_KEYS: &str = "#!/bin/sh -e\n\
    rm -f /etc/ssh/ssh_host_*\n\
    ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key\n\
    if [ -e /run/sshd.pid ]; then read -r sshd < /run/sshd.pid; kill -HUP \"$sshd\"; fi\n";

/// Of which release, which packages beside the essential ones, and what is left out of them.
pub struct Packages<'a> {
    release: &'a str,
    names: Vec<&'a str>,
    exclude: Vec<&'a str>,
}

impl<'a> Packages<'a> {
    /// Those of a base, and of a recipe that stands on it or on none.
    pub fn of(base: Option<&'a Base>, recipe: Option<&'a Recipe>) -> Packages<'a> {
        let base = base.map(|b| &b.recipe);
        let names = base.iter().flat_map(|b| &b.packages).chain(recipe.iter().flat_map(|r| &r.packages));
        let exclude = base.iter().flat_map(|b| &b.exclude).chain(recipe.iter().flat_map(|r| &r.exclude));
        Packages {
            release: base.map_or(SUITE, |b| &b.release),
            names: names.map(String::as_str).collect(),
            exclude: exclude.map(String::as_str).collect(),
        }
    }
}

/// Makes the root file system in `root`, with all that its base has too; downloaded packages are kept in `cache`.
pub fn make(file: &Path, recipe: &Recipe, base: Option<&Base>, root: &Path, cache: &Path, agent: &Path) -> Result<()> {
    if recipe.packages.is_empty() && base.is_none() {
        fs::create_dir_all(root).map_err(io("create", root))?;
    } else {
        bootstrap(&Packages::of(base, Some(recipe)), root, cache)?;
    }
    for folder in ["bin", "sbin", "etc/vmatrix", "proc", "sys", "dev", "run", "tmp", "var", "root"] {
        let path = root.join(folder);
        fs::create_dir_all(&path).map_err(io("create", &path))?;
    }
    let tmp = root.join("tmp");
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).map_err(io("open to all", &tmp))?;
    for extract in &recipe.extracts {
        take(extract, root, cache)?;
    }
    if !root.join("bin/sh").exists() && root.join("bin/busybox").exists() {
        symlink("busybox", root.join("bin/sh")).map_err(io("link", &root.join("bin/sh")))?;
    }
    for copied in &recipe.files {
        let mode = if copied.executable { 0o755 } else { 0o644 };
        install(&beside(file, &copied.from), &within(root, &copied.to), mode)?;
    }
    install(agent, &within(root, AGENT), 0o755)?;
    if within(root, SSHD).exists() {
        let hook = within(root, SSH_HOOK);
        fs::create_dir_all(hook.parent().unwrap_or(root)).map_err(io("create", &hook))?;
        fs::write(&hook, NEW_HOST_KEYS).map_err(io("write", &hook))?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).map_err(io("set the mode of", &hook))?;
    }
    let say = |path: &str, text: String| {
        let path = within(root, path);
        fs::write(&path, text).map_err(io("write", &path))
    };
    say("/etc/hostname", format!("{}\n", recipe.name))?;
    say("/etc/hosts", format!("127.0.0.1 localhost\n127.0.1.1 {}\n", recipe.name))?;
    say("/etc/vmatrix/start", recipe.start.join("\n") + "\n")?;
    if let Some(data) = &recipe.data {
        let mount = within(root, &data.mount);
        fs::create_dir_all(&mount).map_err(io("create", &mount))?;
        say(DATA, format!("{}\n", data.mount))?;
    }
    for line in &recipe.setup {
        run(&format!("setup line {line:?}"), &mut inside(root, line))?;
    }
    // A program that cannot run there would leave a guest that nobody can wake.
    run(
        "the guest agent inside the guest (build it for Debian 12, or statically)",
        &mut inside(root, &format!("{AGENT} --version")),
    )?;
    Ok(())
}

/// Makes a root file system of packages; the same packages give the same files.
pub fn bootstrap(packages: &Packages, root: &Path, cache: &Path) -> Result<()> {
    let debs = cache.join("debs");
    fs::create_dir_all(&debs).map_err(io("create", &debs))?;
    let kept = quote(&debs);
    // It mounts /proc, /sys and /dev/shm into the root. In namespaces of its own those mounts and all its processes go
    // with this one however that ends, and nobody who removes the root finds this machine's files in it.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private"])
        .args(["--pid", "--fork", "--kill-child", "--", "mmdebstrap"])
        .args(["--mode=root", "--variant=essential", "--format=directory"])
        .args(["--skip=download/empty", "--skip=essential/unlink", "--skip=check/empty"])
        // Merged from the start: the package that would merge afterwards needs perl and minutes.
        .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg("--dpkgopt=force-unsafe-io")
        .arg(format!(
            "--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives && cp -a {kept}/. \"$1\"/var/cache/apt/archives/"
        ))
        .arg(format!(
            "--customize-hook=find \"$1\"/var/cache/apt/archives -maxdepth 1 -name '*.deb' -exec mv -f -t {kept} {{}} +"
        ))
        // This machine's, which is nothing of a guest's.
        .arg("--customize-hook=rm -f \"$1\"/etc/resolv.conf \"$1\"/etc/hostname")
        // Has what would tell of the moment of the build say this one instead, or removed.
        .env("SOURCE_DATE_EPOCH", MADE.to_string());
    if !packages.names.is_empty() {
        command.arg(format!("--include={}", packages.names.join(",")));
    }
    for path in NEVER.iter().chain(&packages.exclude) {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.arg(packages.release).arg(root).args(sources(packages.release)?);
    run("mmdebstrap", &mut command).map(drop).map_err(|e| match e {
        Error::Tool { said, .. } if said.contains("Unable to locate package") => Error::BadRecipe {
            file: PathBuf::from(format!("packages {}", packages.names.join(" "))),
            problem: format!("{}; look its name up with `apt-cache search`", said.trim()),
        },
        other => other,
    })
}

fn quote(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

/// The machine's own package sources of a release.
fn sources(release: &str) -> Result<Vec<PathBuf>> {
    let folder = Path::new("/etc/apt/sources.list.d");
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "list" || e == "sources"))
        .chain([PathBuf::from("/etc/apt/sources.list")])
        .filter(|p| fs::read_to_string(p).is_ok_and(|text| names_suite(&text, release)))
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(Error::Tool {
            what: format!("looking for package sources of {release} in /etc/apt"),
            status: "none found".to_owned(),
            said: format!("add `deb <mirror> {release} main` to /etc/apt/sources.list"),
        });
    }
    Ok(files)
}

fn names_suite(text: &str, release: &str) -> bool {
    text.lines().filter(|l| !l.trim_start().starts_with('#')).any(|l| l.split_whitespace().any(|w| w == release))
}

/// Downloads one package, without its dependencies.
pub fn download(package: &str, cache: &Path) -> Result<PathBuf> {
    let singles = cache.join("singles");
    fs::create_dir_all(&singles).map_err(io("create", &singles))?;
    if let Some(held) = held(package, &singles)? {
        return Ok(held);
    }
    let fetch = Scratch::new(singles.join(format!(".{package}-{}", std::process::id())))?;
    let output = Command::new("apt-get")
        .args(["download", "-o", "APT::Sandbox::User=root", package])
        .current_dir(fetch.path())
        .output()
        .map_err(io("run", Path::new("apt-get")))?;
    let Some(deb) = held(package, fetch.path())? else {
        return Err(Error::Tool {
            what: format!("apt-get download {package}"),
            status: output.status.to_string(),
            said: format!(
                "{}; run `apt-get update`, then the same again",
                reason(&String::from_utf8_lossy(&output.stderr))
            ),
        });
    };
    let kept = singles.join(deb.file_name().unwrap_or_default());
    fs::rename(&deb, &kept).map_err(io("rename into", &kept))?;
    Ok(kept)
}

fn held(package: &str, folder: &Path) -> Result<Option<PathBuf>> {
    let prefix = format!("{package}_");
    let entries = fs::read_dir(folder).map_err(io("list", folder))?;
    Ok(entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| {
            p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(&prefix) && n.ends_with(".deb"))
        })
        .max())
}

/// Unpacks a whole package into `to`.
pub fn unpack(deb: &Path, to: &Path) -> Result<()> {
    run("dpkg-deb -x", Command::new("dpkg-deb").arg("-x").arg(deb).arg(to)).map(drop)
}

fn take(extract: &Extract, root: &Path, cache: &Path) -> Result<()> {
    let deb = download(&extract.package, cache)?;
    let whole = Scratch::new(root.join(".vmatrix-extract"))?;
    unpack(&deb, whole.path())?;
    let to = within(root, &extract.to);
    fs::create_dir_all(&to).map_err(io("create", &to))?;
    for path in &extract.paths {
        let from = whole.path().join(path.trim_start_matches('/'));
        if fs::symlink_metadata(&from).is_err() {
            return Err(Error::BadRecipe {
                file: PathBuf::from(format!("package {}", extract.package)),
                problem: format!("has no {path:?}; list what it has with `dpkg-deb -c`"),
            });
        }
        run("cp", Command::new("cp").arg("-a").arg(&from).arg(&to))?;
    }
    Ok(())
}

fn within(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(io("create", folder))?;
    copy(from, to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).map_err(io("set the mode of", to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sources_of_the_guests_release_are_taken() {
        assert!(names_suite("deb [signed-by=/k] mirror bookworm main", "bookworm"));
        assert!(names_suite("Types: deb\nSuites: bookworm bookworm-updates\n", "bookworm"));
        assert!(!names_suite("# deb mirror bookworm main\ndeb mirror trixie main", "bookworm"));
        assert!(!names_suite("Suites: bookworm-backports", "bookworm"));
    }
}
