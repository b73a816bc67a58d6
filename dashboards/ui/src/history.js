// The last five minutes, kept by the page itself: snapshots in, one sample a second out.

/** What the charts show, microseconds. */
export const WINDOW = 300e6;
/** One a second over the window, and one more for the second that has just begun. */
const SAMPLES_MAX = 301;

/** Adds a snapshot to the samples (oldest first); a second one within the same second replaces the first. */
export function remember(samples, snapshot) {
  const demand = {};
  for (const d of snapshot.demand) (demand[d.service] ??= {})[d.region] = d.requests_per_100s / 100;
  const serving = {};
  for (const [network, seen] of Object.entries(snapshot.inventory)) {
    for (const i of seen.instances) {
      if (i.state !== 'serving') continue;
      const of = (serving[i.id.service] ??= {});
      of[network] = (of[network] ?? 0) + 1;
    }
  }
  const sample = { at: snapshot.at, demand, serving };
  const last = samples.at(-1);
  // A clock that runs backwards means another run of the CPA: its history is not this one's.
  const kept = last && last.at > snapshot.at + 1e6 ? [] : samples.filter((s) => s.at >= snapshot.at - WINDOW);
  const same = kept.length && Math.floor(kept.at(-1).at / 1e6) === Math.floor(sample.at / 1e6);
  return [...(same ? kept.slice(0, -1) : kept), sample].slice(-SAMPLES_MAX);
}

/** One line per name: `what` of the chosen services, summed. */
export function lines(samples, what, services, names) {
  return names.map((name) => ({
    name,
    points: samples.map((s) => [s.at, services.reduce((sum, service) => sum + (s[what][service]?.[name] ?? 0), 0)]),
  }));
}
