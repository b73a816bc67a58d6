//! Plays: the same scenario file on real VMs and in virtual time.

mod compare;

use super::image::{build_one, store};
use super::progress::Progress;
use crate::args::{Demo, Lab, Replay};
use crate::exit;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::ExitCode;
use vmatrix_lab::{ChecksFailed, PlayOptions, needs};
use vmatrix_replay::recording::Recording;
use vmatrix_replay::report;
use vmatrix_replay::scenario::Scenario;

/// Builds what is missing, plays, reports; fails if the story did not end well.
pub fn demo(demo: &Demo) -> Result<ExitCode> {
    let scenario = Scenario::read(&demo.scenario)?;
    let store = store(&demo.store)?;
    // What is missing is said before images are built for minutes.
    needs::check_for(&scenario.fleet)?;
    images(&scenario, &demo.recipes, &store)?;
    let told = Progress::begin();
    let keep = !demo.headless;
    let options = PlayOptions { keep, port: demo.port, tell: told.teller(), ..PlayOptions::with_store(&store) };
    let code = vmatrix_lab::play(&scenario, &options, |outcome| {
        told.end();
        match outcome.and_then(|recording| show(&scenario, &recording, demo)) {
            Ok(code) => Ok(code),
            Err(e) => {
                // A play whose checks failed still has figures worth seeing.
                if let Some(failed) = e.downcast_ref::<ChecksFailed>() {
                    show(&scenario, &failed.recording, demo)?;
                }
                // The lab may stay up for hours: nobody shall wait so long to hear what went wrong.
                exit::say(&e);
                Ok(exit::code(&e))
            }
        }
    });
    told.end();
    code
}

pub fn replay(replay: &Replay) -> Result<ExitCode> {
    let scenario = Scenario::read(&replay.file)?;
    if replay.oracle || replay.seeds > 1 || !replay.policy.is_empty() {
        return compare::run(&scenario, replay);
    }
    let recording = vmatrix_replay::replay(&scenario, replay.seed);
    if replay.timeline {
        print!("{}", vmatrix_replay::timeline::timeline(&scenario, &recording));
    }
    report(&scenario, &recording, replay.json, replay.html.as_deref())
}

pub fn lab(lab: &Lab) -> Result<ExitCode> {
    match lab {
        Lab::Up { scenario, store: s, port } => {
            let scenario = Scenario::read(scenario)?;
            let store = store(s)?;
            needs::check_for(&scenario.fleet)?;
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

fn show(scenario: &Scenario, recording: &Recording, demo: &Demo) -> Result<ExitCode> {
    report(scenario, recording, demo.json, demo.html.as_deref())
}

/// Prints a report, and what the scenario expected and the play did not show: the exit code says whether there was any.
fn report(scenario: &Scenario, recording: &Recording, json: bool, html: Option<&Path>) -> Result<ExitCode> {
    let summary = report::summarise(scenario, recording);
    if let Some(path) = html {
        std::fs::write(path, report::html(scenario, recording, &summary))
            .with_context(|| format!("cannot write the report to {}", path.display()))?;
        eprintln!("report with charts: {}", path.display());
    }
    if json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        println!("{summary}");
    }
    Ok(told(&vmatrix_replay::expect::broken(&scenario.expected, &summary)))
}

/// Says what was broken of what a scenario expects.
fn told(broken: &[String]) -> ExitCode {
    broken.iter().for_each(|b| eprintln!("vmatrix: not as expected: {b}"));
    if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(exit::CHANGES) }
}
