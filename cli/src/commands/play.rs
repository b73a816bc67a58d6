//! Plays: the same scenario file on real VMs and in virtual time.

use super::image::{build_one, store};
use super::progress::Progress;
use crate::args::{Demo, Lab, Replay};
use crate::exit::FellShort;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::ExitCode;
use vmatrix_lab::{ChecksFailed, PlayOptions};
use vmatrix_replay::recording::Recording;
use vmatrix_replay::report::{self, Report};
use vmatrix_replay::scenario::Scenario;

/// Builds what is missing, plays, reports; fails if the story did not end well.
pub fn demo(demo: &Demo) -> Result<ExitCode> {
    let scenario = Scenario::read(&demo.scenario)?;
    let store = store(&demo.store)?;
    images(&scenario, &demo.recipes, &store)?;
    let told = Progress::begin();
    let options =
        PlayOptions { keep: !demo.headless, port: demo.port, tell: told.teller(), ..PlayOptions::with_store(&store) };
    // A play whose checks failed still has figures worth seeing.
    let (recording, failed) = match vmatrix_lab::play(&scenario, options) {
        Ok(recording) => (recording, None),
        Err(e) => match e.downcast::<ChecksFailed>() {
            Ok(failed) => ((*failed.recording).clone(), Some(failed)),
            Err(e) => return Err(e),
        },
    };
    told.end();
    let summary = report::summarise(&scenario, &recording);
    show(&scenario, &recording, &summary, demo.json, demo.html.as_deref())?;
    if let Some(failed) = failed {
        return Err(failed.into());
    }
    match shortfall(&summary) {
        Some(why) => Err(FellShort(why).into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

pub fn replay(replay: &Replay) -> Result<ExitCode> {
    let scenario = Scenario::read(&replay.file)?;
    let recording = vmatrix_replay::replay(&scenario, replay.seed);
    let summary = report::summarise(&scenario, &recording);
    if replay.timeline {
        print!("{}", vmatrix_replay::timeline::timeline(&scenario, &recording));
    }
    show(&scenario, &recording, &summary, replay.json, replay.html.as_deref())?;
    Ok(ExitCode::SUCCESS)
}

pub fn lab(lab: &Lab) -> Result<ExitCode> {
    match lab {
        Lab::Up { scenario, store: s, port } => {
            let scenario = Scenario::read(scenario)?;
            let store = store(s)?;
            images(&scenario, Path::new("scenarios/guests"), &store)?;
            let told = Progress::begin();
            vmatrix_lab::up(
                &scenario,
                PlayOptions { port: *port, tell: told.teller(), ..PlayOptions::with_store(&store) },
            )?;
        }
        Lab::Down { id } => vmatrix_lab::down(id.as_deref())?.iter().for_each(|ended| println!("{ended}")),
        Lab::Status => vmatrix_lab::status().iter().for_each(|line| println!("{line}")),
        Lab::Play(play) => return demo(play),
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds every image that the scenario's services name.
fn images(scenario: &Scenario, recipes: &Path, store: &Path) -> Result<()> {
    let names: std::collections::BTreeSet<&str> = scenario.fleet.services.iter().map(|s| s.image.as_str()).collect();
    for name in names {
        let recipe = recipes.join(format!("{name}.toml"));
        build_one(&recipe, store, false).with_context(|| format!("image {name} of scenario {}", scenario.name))?;
    }
    Ok(())
}

fn show(scenario: &Scenario, recording: &Recording, summary: &Report, json: bool, html: Option<&Path>) -> Result<()> {
    if let Some(path) = html {
        std::fs::write(path, report::html(scenario, recording, summary))
            .with_context(|| format!("cannot write the report to {}", path.display()))?;
        eprintln!("report with charts: {}", path.display());
    }
    if json {
        println!("{}", serde_json::to_string(summary)?);
    } else {
        println!("{summary}");
    }
    Ok(())
}

/// What must hold however fast the machine is; figures that depend on it are for the benches and tests.
fn shortfall(r: &Report) -> Option<String> {
    let mut short = Vec::new();
    if r.failed_requests > 0 {
        short.push(format!("{} of {} requests failed", r.failed_requests, r.requests));
    }
    if !r.returned_to_dormant {
        short.push("instances did not all return to dormant".to_owned());
    }
    if r.two_tier.lost_writes > 0 {
        short.push(format!("{} of {} acknowledged writes were lost", r.two_tier.lost_writes, r.two_tier.writes));
    }
    if r.two_tier.plaintext_bytes_on_wan > 0 {
        short.push(format!("{} canary bytes crossed the WAN in plain text", r.two_tier.plaintext_bytes_on_wan));
    }
    (!short.is_empty()).then(|| short.join("; "))
}
