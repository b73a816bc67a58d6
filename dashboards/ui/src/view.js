// Snapshot -> what the page shows. Pure; every part of the page (map, table, lists) reads the same view, so they agree.
import { STATES, total } from './words.js';

/** A VM agent reports every second; one that was quiet for so long is shown as not heard. Microseconds. */
const SILENT_AFTER = 5e6;
const RANK = Object.keys(STATES);

/** The state that says most: an instance that serves outranks one that is still being prepared. */
const strongest = (states) => states.reduce((best, s) => (RANK.indexOf(s) > RANK.indexOf(best) ? s : best), 'absent');

/** One service in one network. */
function share(snapshot, service, network) {
  const wanted = snapshot.placement.services[service]?.[network];
  const seen = snapshot.inventory[network];
  const image = seen?.images[service];
  const instances = (seen?.instances ?? []).filter((i) => i.id.service === service);
  const staged = image ? Math.min(1, image.total ? image.present / image.total : 1) : 0;
  const states = instances.map((i) => i.state);
  if (image && staged < 1) states.push('staging');
  else if (image || wanted === 'dormant') states.push('dormant');
  return {
    service,
    network,
    state: strongest(states),
    wanted: wanted === undefined ? null : wanted === 'dormant' ? 0 : wanted.active,
    serving: instances.filter((i) => i.state === 'serving').length,
    staged,
    image: image ?? null,
    refused: seen?.refused[service] ?? null,
    instances,
  };
}

/**
 * Everything the page shows of a snapshot.
 * @param {string | null} only one service, or all of them
 */
export function view(snapshot, only) {
  const { fleet } = snapshot;
  const services = fleet.service.map((s) => s.name).filter((s) => only === null || s === only);
  const networks = fleet.network.map((n) => {
    const seen = snapshot.inventory[n.name];
    const shares = services.map((s) => share(snapshot, s, n.name));
    const silent = !seen || snapshot.at - seen.at > SILENT_AFTER;
    const staging = shares.filter((s) => s.image && s.staged < 1);
    return {
      name: n.name,
      site: n,
      shares,
      silent,
      heard: seen?.at ?? null,
      state: silent ? 'silent' : strongest(shares.map((s) => s.state)),
      serving: shares.reduce((sum, s) => sum + s.serving, 0),
      staging: staging.length ? Math.min(...staging.map((s) => s.staged)) : null,
      machines: seen?.machines ?? [],
      requests: 0,
      price: tariff(n, snapshot.at),
    };
  });
  const regions = fleet.region.map((r) => ({ name: r.name, site: r, requests: 0, to: {} }));
  for (const d of snapshot.demand) {
    const region = regions.find((r) => r.name === d.region);
    if (!region || !services.includes(d.service)) continue;
    region.requests += d.requests_per_100s;
    for (const [network, n] of Object.entries(d.networks)) {
      region.to[network] = (region.to[network] ?? 0) + n;
      const there = networks.find((x) => x.name === network);
      if (there) there.requests += n;
    }
  }
  const flows = regions.flatMap((r) => Object.entries(r.to).filter(([, n]) => n > 0).map(([network, requests]) => ({ region: r.name, network, requests })));
  // What a network gets from the origin: image bytes while staging, answers of a back end while serving.
  const backed = new Set(fleet.service.filter((s) => s.backend).map((s) => s.name));
  const links = networks.flatMap((n) => [
    ...(n.staging === null ? [] : [{ network: n.name, kind: 'staging' }]),
    ...(n.shares.some((s) => s.serving > 0 && backed.has(s.service)) ? [{ network: n.name, kind: 'tunnel' }] : []),
  ]);
  const instances = networks.flatMap((n) => n.shares.flatMap((s) => s.instances.map((i) => ({ ...i, network: n.name, name: `${i.id.service}-${i.id.number}` }))));
  const decisions = snapshot.decisions.filter((d) => only === null || d.plan.moves.length === 0 || d.plan.moves.some((m) => m.service === only)).toReversed();
  return { services, networks, regions, flows, links, instances, decisions, problems: problems(networks, snapshot.at) };
}

/** Price of an instance-hour now. */
function tariff(network, at) {
  const percent = network.tariff_percent?.[Math.floor(at / 3.6e9) % 24] ?? 100;
  return Math.round((network.instance_hour_microusd * percent) / 100);
}

/** What an operator should look at, in sentences. */
function problems(networks, at) {
  const out = [];
  for (const n of networks) {
    if (n.silent) out.push({ where: n.name, heard: n.heard, text: n.heard === null ? 'its VM agent has not reported yet' : `its VM agent was last heard ${Math.round((at - n.heard) / 1e6)} s ago` });
    for (const s of n.shares) {
      if (s.refused) out.push({ where: n.name, text: `refuses ${s.service}: ${s.refused}` });
      for (const i of s.instances) if (i.trouble) out.push({ where: n.name, text: `${s.service}-${i.id.number}: ${i.trouble}` });
    }
  }
  return out;
}

/** Prices of a plan: per service the first `before` and the last `after`; services with the same whole share one line. */
export function prices(plan) {
  const of = new Map();
  for (const m of plan.moves) of.set(m.service, { before: of.get(m.service)?.before ?? m.before, after: m.after });
  const lines = new Map();
  for (const [service, p] of of) {
    const key = JSON.stringify(p);
    if (total(p.before) === 0 && total(p.after) === 0) continue;
    if (!lines.has(key)) lines.set(key, { ...p, services: [] });
    lines.get(key).services.push(service);
  }
  return [...lines.values()];
}
