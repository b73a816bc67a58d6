// Model values -> the words and figures an operator reads. Pure.

/** Times below this are not of our age: a replay counts from its scenario's begin. Microseconds. */
const LIVE_FROM = 1e15;

/** Clock time (UTC) of a live `Time`, elapsed time of a replayed one. */
export function clock(time) {
  if (time >= LIVE_FROM) return new Date(time / 1000).toISOString().slice(11, 19);
  const s = Math.floor(time / 1e6);
  const two = (n) => String(n).padStart(2, '0');
  return `${two(Math.floor(s / 3600))}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
}

/** Whether a `Time` counts from the epoch. */
export const isLive = (time) => time >= LIVE_FROM;

/** A length of time, microseconds. */
export function span(us) {
  if (us < 1000) return `${Math.round(us)} µs`;
  if (us < 1e6) return `${Math.round(us / 1000)} ms`;
  if (us < 1e7) return `${(us / 1e6).toFixed(1)} s`;
  if (us < 12e7) return `${Math.round(us / 1e6)} s`;
  if (us < 7200e6) return `${Math.floor(us / 6e7)} min`;
  return us < 172800e6 ? `${Math.floor(us / 36e8)} h` : `${Math.floor(us / 864e8)} d`;
}

export function bytes(b) {
  if (b < 1024) return `${b} B`;
  if (b < 1 << 20) return `${(b / 1024).toFixed(1)} KiB`;
  if (b < 2 ** 30) return `${(b / (1 << 20)).toFixed(b < 10 * (1 << 20) ? 1 : 0)} MiB`;
  return `${(b / 2 ** 30).toFixed(2)} GiB`;
}

/** Requests a second from requests in a hundred seconds. */
export function rate(per100s) {
  const r = per100s / 100;
  return r === 0 ? '0' : r < 10 ? r.toFixed(1) : r < 1000 ? String(Math.round(r)) : `${(r / 1000).toFixed(1)}k`;
}

/** Dollars, from millionths, as many decimals as say something. */
export function usd(micro) {
  const v = Math.abs(micro) / 1e6;
  const digits = v >= 100 ? 0 : v >= 1 ? 2 : v >= 0.01 ? 3 : v === 0 ? 0 : 4;
  return `${micro < 0 ? '−' : ''}$${v.toFixed(digits)}`;
}

/** The whole of a `Price`. */
export const total = (price) => price.latency + price.instances + price.traffic;

/** What a move does: sign, verb, and how many. */
export function action({ kind, instances }) {
  switch (kind) {
    case 'stage': return { sign: '↓', verb: 'stage', tone: 'neutral' };
    case 'resume': return { sign: '+', verb: `resume ×${instances}`, tone: 'up' };
    case 'suspend': return { sign: '−', verb: instances ? `suspend to ×${instances}` : 'suspend', tone: 'down' };
    case 'drop': return { sign: '−', verb: 'drop image', tone: 'down' };
    default: return { sign: '·', verb: kind, tone: 'neutral' };
  }
}

/** Why the CPA thought. */
export function cause(c) {
  switch (c.kind) {
    case 'start': return 'First placement';
    case 'burst': return `Crowd in ${c.region}: ${c.service} ${rate(c.requests_per_100s)}/s, usually ${rate(c.usual_per_100s)}/s`;
    case 'epoch': return 'Ordinary round';
    case 'order': return 'Operator’s order';
    case 'loss': return `${c.network} lost instances`;
    default: return c.kind;
  }
}

/** How far a decision is. */
export function progress(d) {
  const since = (t) => span(Math.max(0, t - d.plan.at));
  if (d.done_at != null) return { state: 'done', text: d.serving_at != null ? `serving in ${since(d.serving_at)}` : `done in ${since(d.done_at)}` };
  if (d.serving_at != null) return { state: 'running', text: `serving in ${since(d.serving_at)}, settling` };
  return { state: 'running', text: 'in progress' };
}

/** One sentence for a screen reader. */
export function spoken(d) {
  const moves = d.plan.moves.map((m) => `${action(m.action).verb} ${m.service} at ${m.network}: ${m.reason}`);
  return `Decision ${d.plan.id}. ${cause(d.plan.cause)}. ${moves.join(' ') || 'Nothing moves.'}`;
}

/** The states a network's share of a service can be in, weakest first; the glyph is for eyes that see no hue. */
export const STATES = {
  absent: { glyph: '·', word: 'no image' },
  silent: { glyph: '?', word: 'not heard' },
  dormant: { glyph: '○', word: 'dormant' },
  staging: { glyph: '↓', word: 'staging' },
  suspending: { glyph: '◔', word: 'suspending' },
  draining: { glyph: '◑', word: 'draining' },
  preparing: { glyph: '◌', word: 'preparing' },
  resuming: { glyph: '◐', word: 'resuming' },
  healthy: { glyph: '◕', word: 'healthy' },
  serving: { glyph: '●', word: 'serving' },
};
