//! What may be typed.

mod trace;

pub use trace::{Trace, TraceKind};

use clap::{Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use vmatrix_bench::Scope;

/// An edge network for dynamic content: suspended virtual machines that wake near their users.
#[derive(Debug, Parser)]
#[command(name = "vmatrix", version, arg_required_else_help = true, after_help = crate::exit::TABLE)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Play a scenario on real VMs on this machine, with the live page and a report
    Demo(Demo),
    /// Play a scenario in virtual time, without privileges
    Replay(Replay),
    /// Bring the demo's world up and down, or play a scenario in it
    #[command(subcommand)]
    Lab(Lab),
    /// Build, import, inspect, verify and move images of suspended VMs
    #[command(subcommand)]
    Image(Image),
    /// Plan and apply: so many instances of a service at networks, or one where it is fairest to players
    Place(Place),
    /// Show what an order would do, without doing it
    Plan(Place),
    /// Apply a plan made before
    Apply(Apply),
    /// Say why a service is where it is, and why not elsewhere
    Explain(Explain),
    /// Follow what the CPA sees and decides
    Watch(Cpa),
    /// Say what this machine lacks to host or to play
    Doctor,
    /// Import, generate and describe traces of demand; describe matrices of places
    #[command(subcommand)]
    Trace(Trace),
    /// Run the content placement agent
    Cpa(Daemon),
    /// Run a network's VM agent
    Vma(Daemon),
    /// Run a machine that lends itself to a VM agent
    Machine(Daemon),
    /// Run a network's edge: DNS, NAT, firewall, demand
    Edge(Daemon),
    /// Run the origin: tunnel gateway beside the database
    Origin(Daemon),
    /// Run an image store: serves images to machines over mutual TLS
    Store(Daemon),
    /// Make the fleet's authority, and identities for agents
    #[command(subcommand)]
    Identity(Identity),
    /// Measure, side by side with what others do
    Bench(Bench),
    /// Run the pager of one image (started by the machine)
    #[command(hide = true)]
    Pager(Daemon),
    /// Run one cell's tunnel (started by the machine)
    #[command(hide = true)]
    Tunnel(Tunnel),
    /// Run one end of the relay behind a singleton that moved (started by the machine)
    #[command(hide = true)]
    Relay(Daemon),
    /// Run the lab's WAN emulator (started by the lab)
    #[command(hide = true)]
    Wan(Daemon),
}

impl Command {
    /// What is logged when `VMATRIX_LOG` says nothing: daemons tell what they do, verbs only what is wrong.
    pub fn log_level(&self) -> &'static str {
        match self {
            Command::Cpa(_)
            | Command::Vma(_)
            | Command::Machine(_)
            | Command::Edge(_)
            | Command::Origin(_)
            | Command::Store(_)
            | Command::Pager(_)
            | Command::Relay(_)
            | Command::Tunnel(_)
            | Command::Wan(_) => {
                // hickory tells every query, boringtun every handshake.
                "info,hickory_server=warn,boringtun=error"
            }
            _ => "warn",
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct Demo {
    /// The scenario to play
    #[arg(long, default_value = "scenarios/library/flash-crowd.toml")]
    pub scenario: PathBuf,
    #[command(flatten)]
    pub store: Store,
    /// Recipes of the images that the scenario's services name
    #[arg(long, default_value = "scenarios/guests")]
    pub recipes: PathBuf,
    /// End when the story ends, instead of leaving the world up until Ctrl-C
    #[arg(long)]
    pub headless: bool,
    /// Print the report as one JSON object on the last line
    #[arg(long)]
    pub json: bool,
    /// Write the report with its charts to this file
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// Port of the live page on 127.0.0.1; the next free one if it is taken
    #[arg(long, default_value_t = 8440)]
    pub port: u16,
}

#[derive(Debug, clap::Args)]
pub struct Store {
    /// Where built images are kept
    #[arg(long, env = "VMATRIX_STORE")]
    pub store: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct Replay {
    /// The scenario to play
    pub file: PathBuf,
    /// Instead of the scenario's own seed
    #[arg(long)]
    pub seed: Option<u64>,
    /// Print the report as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Print what happened, line by line
    #[arg(long)]
    pub timeline: bool,
    /// Write the report with its charts to this file
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// Compare ways to place services: `mpc` (ours), `myopic`, `static`, `best-single`, `none`; may be given again
    #[arg(long, conflicts_with_all = ["timeline", "html"])]
    pub policy: Vec<vmatrix_replay::policy::Policy>,
    /// Compare over so many seeds, the scenario's (or `--seed`) and those after it
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000), conflicts_with_all = ["timeline", "html"])]
    pub seeds: u64,
    /// Say between which bounds the cost must lie: certified from below, from above a placement that knows the future
    #[arg(long, conflicts_with_all = ["timeline", "html"])]
    pub oracle: bool,
}

#[derive(Debug, Subcommand)]
pub enum Lab {
    /// Bring the world of a scenario up and leave it running
    Up {
        /// Its fleet is what comes up
        #[arg(default_value = "scenarios/library/flash-crowd.toml")]
        scenario: PathBuf,
        #[command(flatten)]
        store: Store,
        /// Port of the live page on 127.0.0.1
        #[arg(long, default_value_t = 8440)]
        port: u16,
    },
    /// Take labs on this machine down, crashed ones too
    Down {
        /// As `vmatrix lab status` shows it; all labs without it
        id: Option<String>,
    },
    /// Show the labs on this machine
    Status,
    /// Play a scenario from start to end
    Play(Demo),
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Build an image from a recipe, unless it is there already
    Build {
        recipe: PathBuf,
        #[command(flatten)]
        store: Store,
        /// Build even if the store has it
        #[arg(long)]
        again: bool,
    },
    /// Show what an image is
    Inspect {
        name: String,
        #[command(flatten)]
        store: Store,
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Check an image's signature and every one of its chunks
    Verify {
        name: String,
        #[command(flatten)]
        store: Store,
        /// Put what is missing or damaged again, from another store
        #[arg(long, value_name = "STORE")]
        repair_from: Option<String>,
    },
    /// Record anew which pages the waking guest touches first
    Record {
        name: String,
        /// The recipe whose requests are replayed; without it, the health check
        #[arg(long)]
        recipe: Option<PathBuf>,
        #[command(flatten)]
        store: Store,
    },
    /// Make a suspended image of a disk image or appliance: raw, qcow2, OVA, Debian cloud image
    Import(Import),
    /// Write an image's disk to a file
    Export {
        name: String,
        /// The file to write
        #[arg(long)]
        to: PathBuf,
        /// What to write; as the file's name says without it
        #[arg(long, value_enum)]
        format: Option<DiskFormat>,
        #[command(flatten)]
        store: Store,
    },
    /// Copy an image to another store: only what is missing there
    Push {
        name: String,
        /// A folder, or s3://bucket/prefix?endpoint=URL&region=NAME
        #[arg(long)]
        to: String,
        #[command(flatten)]
        store: Store,
    },
    /// Copy an image from another store: only what is missing here
    Pull {
        name: String,
        /// A folder, or s3://bucket/prefix?endpoint=URL&region=NAME
        #[arg(long)]
        from: String,
        #[command(flatten)]
        store: Store,
    },
    /// Remove what no image reaches
    Gc {
        #[command(flatten)]
        store: Store,
        /// Only what has not been needed for so many hours
        #[arg(long, default_value_t = 24)]
        grace_hours: u32,
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Import {
    /// The disk image or appliance
    pub file: PathBuf,
    /// Name of the image to make
    #[arg(long)]
    pub name: String,
    /// What the file is; as its name says without it, and never guessed from its content
    #[arg(long, value_enum)]
    pub format: Option<DiskFormat>,
    /// Memory of the guest, MiB; an OVA says it itself
    #[arg(long)]
    pub memory_mib: Option<u64>,
    /// TCP ports it answers on
    #[arg(long = "port", required = true)]
    pub ports: Vec<u16>,
    /// Plain HTTP path that is answered with 200 once it serves
    #[arg(long, default_value = "/")]
    pub health_path: String,
    /// Port of the health check; the first port without it
    #[arg(long)]
    pub health_port: Option<u16>,
    /// HTTP status that means healthy
    #[arg(long, default_value_t = 200)]
    pub health_status: u16,
    /// Path to warm the guest with, besides the health check's; may be given again
    #[arg(long)]
    pub warm: Vec<String>,
    /// How often each path is asked for
    #[arg(long, default_value_t = 20)]
    pub times: u32,
    /// cloud-init user-data for a guest that reads it
    #[arg(long)]
    pub user_data: Option<PathBuf>,
    #[command(flatten)]
    pub store: Store,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiskFormat {
    Raw,
    Qcow2,
    Vmdk,
    Ova,
}

#[derive(Debug, Subcommand)]
pub enum Identity {
    /// Make the fleet's authority
    Authority {
        /// A new folder for its key and certificate
        dir: PathBuf,
    },
    /// Issue an agent's identity
    Issue {
        /// Folder of the authority
        #[arg(long)]
        authority: PathBuf,
        /// `store`, `machine` or `operator`
        role: String,
        /// The agent's own name, for instance tokyo-m1
        id: String,
        /// A new folder for ca.pem, cert.pem and key.pem
        #[arg(long)]
        to: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub struct Bench {
    /// `relocate`, `resume`, `density`, `wire`, `fanout`, `singleton` or `placement`; none: only what `--write` says
    #[arg(required_unless_present = "write")]
    pub name: Option<String>,
    /// Print the result as one JSON object on the last line
    #[arg(long)]
    pub json: bool,
    /// Few rows and runs: whether it works, not how fast it is
    #[arg(long)]
    pub quick: bool,
    /// Only rows whose guest/mechanism/link contains one of these; of `placement` its parts, by name, or quality/MATRIX
    #[arg(long)]
    pub rows: Vec<String>,
    /// Runs of each row, instead of five; of `placement` seeds of each world, instead of ten
    #[arg(long)]
    pub runs: Option<u64>,
    /// Clones that `density` keeps alive
    #[arg(long, value_name = "N", default_value_t = Scope::default().clones)]
    pub clones: u32,
    /// Numbers of networks that `fanout` brings the image to
    #[arg(long, value_name = "N", default_values_t = Scope::default().networks)]
    pub networks: Vec<usize>,
    /// Add the rows to a result file, where they replace those of the same guest, memory, link and mechanism
    #[arg(long, value_name = "FILE")]
    pub into: Option<PathBuf>,
    /// Result files for `--write`
    #[arg(long, value_name = "FILE", requires = "write")]
    pub from: Vec<PathBuf>,
    /// Write the page of results (Markdown): of `--into`, or of every `--from`
    #[arg(long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Recipes of the guests
    #[arg(long, default_value = "scenarios/guests")]
    pub recipes: PathBuf,
    #[command(flatten)]
    pub store: Store,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

#[derive(Debug, clap::Args)]
pub struct Cpa {
    /// Where the CPA is
    #[arg(long, env = "VMATRIX_CPA", default_value = "http://127.0.0.1:8440")]
    pub cpa: String,
    /// File that holds the fleet token; without it, that of the lab that is up
    #[arg(long, env = "VMATRIX_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

#[derive(Debug, clap::Args)]
pub struct Place {
    pub service: String,
    /// Instances at a network, for instance --at tokyo=1 --at ashburn=0; networks not named keep theirs
    #[arg(long = "at", required_unless_present = "fair", value_name = "NETWORK=N")]
    pub at: Vec<String>,
    /// One instance at the network that is fairest to the --team or --player given
    #[arg(long)]
    pub fair: bool,
    /// With --fair: the region of each player of a team, for instance --team seoul,tokyo --team berlin,paris
    #[arg(long = "team", requires = "fair", conflicts_with = "players", value_name = "REGION,…")]
    pub teams: Vec<String>,
    /// With --fair: the region of somebody without a team; given again for each
    #[arg(long = "player", requires = "fair", value_name = "REGION")]
    pub players: Vec<String>,
    /// With --fair: how much longer than the best possible the longest round trip may be, per cent [default: 10]
    #[arg(long, requires = "fair", value_name = "N")]
    pub slack_percent: Option<u32>,
    /// With --fair: what no player's round trip may be above
    #[arg(long, requires = "fair", value_name = "N")]
    pub cap_ms: Option<u32>,
    /// With `plan`: exit with 3 if there is anything to do
    #[arg(long)]
    pub exit_code: bool,
    #[command(flatten)]
    pub cpa: Cpa,
}

#[derive(Debug, clap::Args)]
pub struct Apply {
    /// The plan's number, as `vmatrix plan` printed it
    pub plan: u64,
    #[command(flatten)]
    pub cpa: Cpa,
}

#[derive(Debug, clap::Args)]
pub struct Explain {
    pub service: String,
    #[command(flatten)]
    pub cpa: Cpa,
}

#[derive(Debug, clap::Args)]
pub struct Daemon {
    /// Its TOML file; docs/api.md lists the keys
    #[arg(long)]
    pub config: PathBuf,
}

#[derive(Debug, clap::Args)]
pub struct Tunnel {
    /// The cell's network namespace
    #[arg(long)]
    pub netns: PathBuf,
    #[arg(long)]
    pub network: String,
    /// The instance's name
    #[arg(long)]
    pub cell: String,
    /// URL of the origin
    #[arg(long)]
    pub origin: String,
    #[arg(long)]
    pub token_file: PathBuf,
    /// TUN device to make inside the cell
    #[arg(long)]
    pub device: String,
    /// File that says whether the tunnel is up
    #[arg(long)]
    pub status: PathBuf,
}
