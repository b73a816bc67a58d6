//! A PostgreSQL of our own in a directory, for as long as somebody holds it: the origin's back end in
//! the lab, and what an image is warmed against.
//!
//! SQL ─start─▶ server on address:port, inside a namespace ─dump─▶ SQL; dropped: stopped.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use vmatrix_vma_image::error::{Error, Result, io};
use vmatrix_vma_image::netns;

/// The owner of the server: PostgreSQL refuses to run as root.
const OWNER: &str = "postgres";
const PACKAGE: &str = "postgresql";

/// A running server.
#[derive(Debug)]
pub struct Server {
    bin: PathBuf,
    dir: PathBuf,
    netns: Option<PathBuf>,
    port: u16,
    running: bool,
}

impl Server {
    /// Starts a server whose data lie in `dir`, listening on `address:port` inside `netns` (or here), and
    /// runs `seed_sql` as its superuser if the data are new. Data that are there already are kept.
    ///
    /// `dir` and what leads to it must be open to the user `postgres`.
    ///
    /// # Errors
    /// PostgreSQL is missing, the address is in use, or the SQL is refused.
    pub fn start(
        netns: Option<&Path>,
        dir: &Path,
        address: Ipv4Addr,
        port: u16,
        seed_sql: Option<&str>,
    ) -> Result<Server> {
        let bin = binaries()?;
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        let mut server = Server { bin, dir: dir.to_owned(), netns: netns.map(Path::to_owned), port, running: false };
        let fresh = !server.data().join("PG_VERSION").exists();
        if fresh {
            own(dir)?;
            server.run(
                "initdb",
                ["-A", "trust", "-E", "UTF8", "--locale=C", "-N", "-D"]
                    .map(OsStr::new)
                    .into_iter()
                    .chain([server.data().as_os_str()]),
                None,
            )?;
            server.configure(address, port)?;
        }
        let log = server.log();
        let data = server.data();
        server
            .run(
                "pg_ctl",
                [
                    OsStr::new("-w"),
                    OsStr::new("-t"),
                    OsStr::new("30"),
                    OsStr::new("-D"),
                    data.as_os_str(),
                    OsStr::new("-l"),
                    log.as_os_str(),
                    OsStr::new("start"),
                ],
                None,
            )
            .map_err(|e| server.with_log(e))?;
        server.running = true;
        if let (true, Some(sql)) = (fresh, seed_sql) {
            server.sql("postgres", sql)?;
        }
        Ok(server)
    }

    /// Lets whoever connects from the server's own address do so without a password: for the packages' own
    /// scripts at build time. It is not part of a dump.
    ///
    /// # Errors
    /// The configuration cannot be written.
    pub fn trust_own_address(&self, address: Ipv4Addr) -> Result<()> {
        let path = self.data().join("pg_hba.conf");
        let kept = fs::read_to_string(&path).map_err(io("read", &path))?;
        fs::write(&path, format!("host all all {address}/32 trust\n{kept}")).map_err(io("write", &path))?;
        self.sql("postgres", "SELECT pg_reload_conf()").map(drop)
    }

    /// Runs SQL (or psql's own commands) in `database` as the superuser; stops at the first error.
    ///
    /// # Errors
    /// What psql said.
    pub fn sql(&self, database: &str, sql: &str) -> Result<String> {
        let port = self.port.to_string();
        let output = self.run(
            "psql",
            ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-p", &port, "-d", database, "-f", "-"].map(OsStr::new),
            Some(sql),
        )?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Everything the server holds, as SQL that [`Server::start`] takes: roles, databases, rows.
    ///
    /// # Errors
    /// What pg_dumpall said.
    pub fn dump(&self) -> Result<String> {
        let port = self.port.to_string();
        let output = self.run("pg_dumpall", ["-p", &port, "--exclude-database=template*"].map(OsStr::new), None)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // The superuser exists wherever this is run.
        let kept = text.lines().filter(|l| *l != "CREATE ROLE postgres;");
        Ok(kept.fold(String::with_capacity(text.len()), |all, line| all + line + "\n"))
    }

    /// The server's own log: every statement, if it was told to log them.
    pub fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Stops the server; the data stay in their directory.
    ///
    /// # Errors
    /// It does not stop within 30 s.
    pub fn stop(mut self) -> Result<()> {
        self.halt()
    }

    fn halt(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.running) {
            return Ok(());
        }
        let data = self.data();
        self.run(
            "pg_ctl",
            [
                OsStr::new("-w"),
                OsStr::new("-t"),
                OsStr::new("30"),
                OsStr::new("-m"),
                OsStr::new("immediate"),
                OsStr::new("-D"),
                data.as_os_str(),
                OsStr::new("stop"),
            ],
            None,
        )
        .map(drop)
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn configure(&self, address: Ipv4Addr, port: u16) -> Result<()> {
        let append = |name: &str, text: String| {
            let path = self.data().join(name);
            fs::OpenOptions::new()
                .append(true)
                .open(&path)
                .and_then(|mut f| f.write_all(text.as_bytes()))
                .map_err(io("write", &path))
        };
        // A database for tests of moves, not of crashes of its own machine: `fsync` stays on, for lost
        // writes are what the lab counts.
        append(
            "postgresql.conf",
            format!(
                "\nlisten_addresses = '{address}'\nport = {port}\nunix_socket_directories = '{}'\nmax_connections = 50\nshared_buffers = 32MB\n",
                self.dir.display()
            ),
        )?;
        append("pg_hba.conf", "host all all 0.0.0.0/0 scram-sha-256\n".to_owned())
    }

    /// Runs one of PostgreSQL's programs as its owner, inside the namespace.
    fn run<'a>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = &'a OsStr>,
        input: Option<&str>,
    ) -> Result<Output> {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", OWNER, "--regid", OWNER, "--init-groups"])
            .arg(self.bin.join(program))
            .args(arguments)
            .current_dir(&self.dir)
            .env("PGHOST", &self.dir)
            .env("LC_ALL", "C.UTF-8")
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stderr(Stdio::piped())
            // `pg_ctl start` leaves the server holding whatever it inherits.
            .stdout(if program == "pg_ctl" { Stdio::null() } else { Stdio::piped() });
        if program == "pg_ctl" {
            command.stderr(Stdio::null());
        }
        let tool = self.bin.join(program);
        let mut work = || -> Result<Output> {
            let mut child = command.spawn().map_err(io("run", &tool))?;
            // Fed from beside: a full pipe on each side would wait for ever.
            let feeding = child
                .stdin
                .take()
                .zip(input.map(str::to_owned))
                .map(|(mut pipe, text)| std::thread::spawn(move || pipe.write_all(text.as_bytes())));
            let output = child.wait_with_output().map_err(io("wait for", &tool))?;
            if let Some(feeding) = feeding {
                // If the program gave up early, its status says so.
                let _ = feeding.join();
            }
            Ok(output)
        };
        let output = match &self.netns {
            Some(netns) => netns::enter(netns, work)??,
            None => work()?,
        };
        if output.status.success() {
            return Ok(output);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Error::Tool {
            what: format!("{program} in {}", self.dir.display()),
            status: output.status.to_string(),
            said: last(&said),
        })
    }

    fn with_log(&self, error: Error) -> Error {
        match (error, fs::read_to_string(self.log())) {
            (Error::Tool { what, status, .. }, Ok(log)) => Error::Tool { what, status, said: last(&log) },
            (error, _) => error,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.halt() {
            tracing::warn!(%error, "PostgreSQL did not stop");
        }
    }
}

/// The last few hundred characters: where the reason stands.
fn last(text: &str) -> String {
    let text = text.trim();
    let skip = text.chars().count().saturating_sub(600);
    text.chars().skip(skip).collect()
}

/// Debian keeps each version's programs in a folder of its own; the newest is taken.
fn binaries() -> Result<PathBuf> {
    let root = Path::new("/usr/lib/postgresql");
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir(root)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let bin = entry.path().join("bin");
            bin.join("initdb").exists().then_some((entry.file_name().to_str()?.parse().ok()?, bin))
        })
        .collect();
    versions.sort();
    versions
        .pop()
        .map(|(_, bin)| bin)
        .ok_or(Error::Missing { program: "PostgreSQL's initdb".to_owned(), package: PACKAGE })
}

fn own(dir: &Path) -> Result<()> {
    let user = nix::unistd::User::from_name(OWNER)
        .ok()
        .flatten()
        .ok_or(Error::Missing { program: "the user postgres".to_owned(), package: PACKAGE })?;
    nix::unistd::chown(dir, Some(user.uid), Some(user.gid)).map_err(|e| io("give to postgres", dir)(e.into()))
}
