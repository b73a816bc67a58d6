//! The operator's verbs: each goes through the CPA's own plan, check and apply.

use super::block_on;
use crate::args::{Apply, Cpa, Explain, Output, Place};
use crate::exit;
use anyhow::{Context, Result, bail};
use std::process::ExitCode;
use vmatrix_cpa_agent::client::Client;
use vmatrix_model::RegionId;
use vmatrix_model::plan::{Decision, Plan};
use vmatrix_model::wire::{Event, Fair, Order, Snapshot};

fn client(cpa: &Cpa) -> Result<Client> {
    let file = match &cpa.token_file {
        Some(file) => file.clone(),
        None => vmatrix_lab::place::states()
            .into_iter()
            .find(vmatrix_lab::LabState::alive)
            .map(|lab| lab.token_file)
            .context("no lab is up, so there is no fleet token to be found\n\nhint: name one with --token-file")?,
    };
    let token =
        std::fs::read_to_string(&file).with_context(|| format!("cannot read the fleet token in {}", file.display()))?;
    Ok(Client::new(&cpa.cpa, token.trim())?)
}

fn order(place: &Place) -> Result<Order> {
    let mut at = std::collections::BTreeMap::new();
    for wish in &place.at {
        let Some((network, number)) = wish.split_once('=') else {
            bail!(
                "--at {wish:?} is not NETWORK=N\n\nhint: --at tokyo=1 asks for one instance in tokyo, --at tokyo=0 for none"
            );
        };
        let number =
            number.parse().with_context(|| format!("--at {wish:?}: {number:?} is not a number of instances"))?;
        if at.insert(network.parse()?, number).is_some() {
            bail!("--at names {network} twice");
        }
    }
    let fair = place.fair.then(|| fair(place)).transpose()?;
    Ok(Order { service: place.service.parse()?, at, fair })
}

/// Who is to meet: teams as given, or everybody for themselves.
fn fair(place: &Place) -> Result<Fair> {
    let team = |names: &String| -> Result<Vec<RegionId>> {
        let regions = names.split(',').map(|r| r.trim().parse());
        regions.collect::<Result<_, _>>().with_context(|| {
            format!("--team {names:?} is not a list of regions\n\nhint: regions of the fleet, as in --team seoul,tokyo")
        })
    };
    let player = |name: &String| -> Result<Vec<RegionId>> {
        Ok(vec![name.parse().with_context(|| {
            format!(
                "--player {name:?} is not a region\n\nhint: one region of the fleet each time, as in --player seoul"
            )
        })?])
    };
    let teams = place.teams.iter().map(team).chain(place.players.iter().map(player)).collect::<Result<_>>()?;
    Ok(Fair { teams, slack_percent: place.slack_percent, cap_ms: place.cap_ms })
}

pub fn plan(place: &Place) -> Result<ExitCode> {
    let plan = block_on(async { Ok(client(&place.cpa)?.plan(&order(place)?).await?) })?;
    show_plan(&plan, place.cpa.output)?;
    if place.cpa.output == Output::Table && !plan.moves.is_empty() {
        eprintln!("\nhint: vmatrix apply {}", plan.id);
    }
    Ok(if place.exit_code && !plan.moves.is_empty() { ExitCode::from(exit::CHANGES) } else { ExitCode::SUCCESS })
}

pub fn place(place: &Place) -> Result<ExitCode> {
    let decision = block_on(async {
        let client = client(&place.cpa)?;
        let plan = client.plan(&order(place)?).await?;
        show_plan(&plan, Output::Table)?;
        if plan.moves.is_empty() {
            return Ok(None);
        }
        Ok(Some(client.apply(plan.id).await?))
    })?;
    if let Some(decision) = decision {
        show_decision(&decision, place.cpa.output)?;
    }
    Ok(ExitCode::SUCCESS)
}

pub fn apply(apply: &Apply) -> Result<ExitCode> {
    let decision = block_on(async { Ok(client(&apply.cpa)?.apply(apply.plan).await?) })?;
    show_decision(&decision, apply.cpa.output)?;
    Ok(ExitCode::SUCCESS)
}

pub fn explain(explain: &Explain) -> Result<ExitCode> {
    let service = explain.service.parse()?;
    let told = block_on(async { Ok(client(&explain.cpa)?.explain(&service).await?) })?;
    match explain.cpa.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&told)?),
        Output::Table => told.lines.iter().for_each(|l| println!("{l}")),
    }
    Ok(ExitCode::SUCCESS)
}

pub fn watch(cpa: &Cpa) -> Result<ExitCode> {
    use futures_util::StreamExt;
    block_on(async {
        let mut events = std::pin::pin!(client(cpa)?.events().await?);
        while let Some(event) = events.next().await {
            let event = event?;
            match (cpa.output, &event) {
                (Output::Json, _) => println!("{}", serde_json::to_string(&event)?),
                (Output::Table, Event::Snapshot(s)) => println!("{}", one_line(s)),
                (Output::Table, Event::Decision(d)) => show_decision(d, Output::Table)?,
            }
        }
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn show_plan(plan: &Plan, output: Output) -> Result<()> {
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(plan)?);
        return Ok(());
    }
    println!("plan {} on {}", plan.id, plan.base);
    if plan.moves.is_empty() {
        println!("nothing to do");
    }
    plan.moves.iter().for_each(|m| println!("{m}"));
    plan.not.iter().for_each(|n| println!("{n}"));
    Ok(())
}

fn show_decision(decision: &Decision, output: Output) -> Result<()> {
    if output == Output::Json {
        println!("{}", serde_json::to_string(decision)?);
        return Ok(());
    }
    println!("{} applies plan {}", decision.generation, decision.plan.id);
    decision.plan.moves.iter().for_each(|m| println!("{m}"));
    Ok(())
}

/// The world in a line: where each service runs, and what is asked of it.
fn one_line(s: &Snapshot) -> String {
    let services = s.fleet.services.iter().map(|service| {
        let running: Vec<String> = s.placement.active(&service.name).map(ToString::to_string).collect();
        let asked: u64 = s.demand.iter().filter(|d| d.service == service.name).map(|d| d.requests_per_100s).sum();
        format!("{} @ {} {}.{:02}/s", service.name, running.join(", "), asked / 100, asked % 100)
    });
    format!("{} {}", s.placement.generation, services.collect::<Vec<_>>().join("  "))
}
