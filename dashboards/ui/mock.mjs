// A CPA that is not there: replays a believable flash crowd as server-sent events and serves ../dist, so that the page
// can be looked at and tested alone. For development only.
//
//   node mock.mjs [--port 8449] [--from SECONDS] [--speed N] [--trouble]
import { createServer } from 'node:http';
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const DIST = new URL('../dist/', import.meta.url);
const TYPES = { html: 'text/html; charset=utf-8', js: 'text/javascript', css: 'text/css', txt: 'text/plain; charset=utf-8', svg: 'image/svg+xml' };
/** What the real server sends too: nothing foreign, nothing inline. */
const POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const S = 1e6;
const MIB = 1 << 20;

const network = (name, lat, lon, prefix, instance_hour_microusd, egress_gb_microusd) => ({ name, lat, lon, prefix, machines: 1, machine_memory_mib: 3072, instance_hour_microusd, egress_gb_microusd, tariff_percent: [] });
const service = (name, objective_ms, ports, more) => ({ name, image: name, home: 'ashburn', automatic: true, objective_ms, latency_second_microusd: 400, ports, memory_mib: 512, instance_rps: 40, instances_max: 2, response_packets: 12, backend: null, profile: { answer_ms: 60, resume_ms: 1500, image_mib: 160 }, ...more });
const FLEET = {
  zone: 'vmatrix.test',
  ttl_s: 4,
  origin: { name: 'origin', lat: 41.9, lon: -87.6, prefix: '198.19.0.0/24', intranet: '172.21.162.0/24' },
  network: [
    network('ashburn', 39.0, -77.5, '198.19.1.0/24', 60000, 20000),
    network('dublin', 53.3, -6.3, '198.19.2.0/24', 70000, 20000),
    network('tokyo', 35.7, 139.7, '198.19.3.0/24', 80000, 90000),
  ],
  region: [
    { name: 'new-york', lat: 40.7, lon: -74.0, prefix: '198.18.1.0/24' },
    { name: 'berlin', lat: 52.5, lon: 13.4, prefix: '198.18.2.0/24' },
    { name: 'seoul', lat: 37.6, lon: 127.0, prefix: '198.18.3.0/24' },
    { name: 'sao-paulo', lat: -23.5, lon: -46.6, prefix: '198.18.4.0/24' },
  ],
  link: [],
  service: [
    service('maps', 400, [80], {}),
    service('agenda', 8000, [443], { backend: { name: 'db', address: '172.21.162.20', port: 5432, packets: 40, round_trips: 20 } }),
  ],
};

/** When what happens, seconds since the story began; it begins again after LENGTH. */
const LENGTH = 150;
const T = { crowd: 8, burst: 11.2, serves: 14.6, clamped: 18.6, order: 38, staged: 50, agenda: 53.4, ebb: 82, epoch: 98, drained: 104, asleep: 105.2, back: 128, gone: 133 };

const price = (latency, instances, traffic) => ({ latency, instances, traffic });
const placement = (generation, maps, agenda) => ({ generation, services: { maps, agenda } });
const on = (n) => ({ active: n });
const HOME = { ashburn: on(1), dublin: 'dormant', tokyo: 'dormant' };

/** The decisions of one telling of the story that begins at `t0` (microseconds), with how far they are at `t` seconds. */
function decisions(t0, t, round) {
  const at = (s) => Math.round(t0 + s * S);
  const passed = (s) => (t >= s ? at(s) : null);
  const make = (number, s, cause, moves, not, target, serving, done) => ({
    plan: { id: round * 4 + number, at: at(s), cause, base: round * 8 + number * 2 - 2, moves, not, target },
    generation: round * 8 + number * 2 - 1,
    serving_at: passed(serving),
    done_at: passed(done),
  });
  const g = round * 8;
  const all = [
    make(1, T.burst, { kind: 'burst', service: 'maps', region: 'seoul', requests_per_100s: 4100, usual_per_100s: 200 },
      [{ service: 'maps', network: 'tokyo', action: { kind: 'resume', instances: 1 }, bytes: 0, time: 3.4 * S, before: price(18_420_000, 60000, 214_000), after: price(4_950_000, 140000, 391_000), reason: 'Seoul asks 41 requests/s; from Tokyo an answer takes 100 ms instead of 290 ms, and the image is already there.' }],
      [{ service: 'maps', network: 'dublin', reason: 'Seoul would wait 255 ms from there: saves $1.90 an hour, Tokyo saves $13.21.' }, { service: 'maps', network: 'ashburn', reason: 'a second instance there would not shorten the way: no saving, $0.060 an hour more.' }],
      placement(g + 2, { ...HOME, tokyo: on(1) }, { ashburn: on(1), tokyo: 'dormant' }), T.serves, T.clamped),
    make(2, T.order, { kind: 'order' },
      [{ service: 'agenda', network: 'dublin', action: { kind: 'stage' }, bytes: 158 * MIB, time: 12 * S, before: price(7_120_000, 200000, 402_000), after: price(6_890_000, 270000, 455_000), reason: 'Dublin holds nothing of the image yet.' },
        { service: 'agenda', network: 'dublin', action: { kind: 'resume', instances: 1 }, bytes: 0, time: 3 * S, before: price(7_120_000, 200000, 402_000), after: price(6_890_000, 270000, 455_000), reason: 'Ordered: agenda at dublin ×1. Its database stays at the origin, 20 round trips of 90 ms a request.' }],
      [], placement(g + 4, { ...HOME, tokyo: on(1) }, { ashburn: on(1), dublin: on(1), tokyo: 'dormant' }), T.agenda, T.agenda + 4),
    make(3, T.epoch, { kind: 'epoch' },
      [{ service: 'maps', network: 'tokyo', action: { kind: 'suspend', instances: 0 }, bytes: 0, time: 6 * S, before: price(910_000, 210000, 96_000), after: price(938_000, 130000, 92_000), reason: 'The crowd in Seoul has gone: 2 requests/s no longer pay for an instance in Tokyo.' }],
      [{ service: 'maps', network: 'tokyo', reason: 'dropping the image would save nothing that a second resume would not cost.' }],
      placement(g + 6, HOME, { ashburn: on(1), dublin: on(1), tokyo: 'dormant' }), T.asleep, T.asleep),
    make(4, T.back, { kind: 'order' },
      [{ service: 'agenda', network: 'dublin', action: { kind: 'suspend', instances: 0 }, bytes: 0, time: 5 * S, before: price(938_000, 130000, 92_000), after: price(991_000, 60000, 88_000), reason: 'Ordered: agenda back to Ashburn alone.' }],
      [], placement(g + 8, HOME, { ashburn: on(1), dublin: 'dormant', tokyo: 'dormant' }), T.gone, T.gone),
  ];
  return all.filter((d) => at(t) >= d.plan.at);
}

/** Between 0 and 1: how much of the way from `a` to `b` is done at `t`. */
const ramp = (t, a, b) => Math.min(1, Math.max(0, (t - a) / (b - a)));
/** A calm, repeatable wobble about 1. */
const wobble = (t, phase) => 1 + 0.05 * Math.sin(t / 2.3 + phase) + 0.03 * Math.sin(t / 0.9 + 2 * phase);

/** The world at `t` seconds of the story, as the CPA would tell it. */
export function snapshot(began, elapsed, { trouble = false } = {}) {
  const round = Math.floor(elapsed / LENGTH);
  const t = elapsed % LENGTH;
  const t0 = began + round * LENGTH * S;
  const now = Math.round(began + elapsed * S);
  const since = (s) => Math.round(t0 + s * S);
  const made = Array.from({ length: round + 1 }, (_, r) => decisions(began + r * LENGTH * S, r < round ? LENGTH : t, r)).flat().slice(-50);

  const instance = (service, network, state, s, resumed_in = null) => ({ id: { service, number: 0 }, machine: 'm1', state, since: s === null ? began - 3600 * S : since(s), resumed_in, trouble: null });
  const stages = (service, network, from, serves, drain, drained, gone) => {
    if (t < from || t >= gone) return [];
    const span = serves - from;
    if (t < from + 0.15 * span) return [instance(service, network, 'preparing', from)];
    if (t < from + 0.8 * span) return [instance(service, network, 'resuming', from + 0.15 * span)];
    if (t < serves) return [instance(service, network, 'healthy', from + 0.8 * span, span * 0.8 * S)];
    if (t < drain) return [instance(service, network, 'serving', serves, span * 0.8 * S)];
    return [instance(service, network, t < drained ? 'draining' : 'suspending', t < drained ? drain : drained, span * 0.8 * S)];
  };
  const inTokyo = stages('maps', 'tokyo', T.burst + 0.2, T.serves, T.epoch, T.drained, T.asleep);
  const inDublin = stages('agenda', 'dublin', T.staged, T.agenda, T.back, T.gone - 1, T.gone);
  const digest = (c) => c.repeat(64);
  const image = (c, total, share = 1) => ({ digest: digest(c), present: Math.round(total * share), total, fetched: Math.round(total * share) });
  const fetched = ramp(t, T.order + 0.4, T.staged) || (round > 0 ? 1 : 0);
  const inventory = (network, images, instances) => ({
    network,
    at: now - 300_000,
    generation: made.at(-1)?.generation ?? 1,
    machines: [{ id: 'm1', cpus: 2, memory_mib: 3072, free_mib: 3072 - 512 * instances.length, accelerator: 'tcg', qemu_version: '10.0.2' }],
    images,
    instances,
    refused: {},
  });
  const M = 161 * MIB;
  const A = 158 * MIB;
  const seen = {
    ashburn: inventory('ashburn', { maps: image('a', M), agenda: image('b', A) }, [instance('maps', 'ashburn', 'serving', null, 1_840_000), instance('agenda', 'ashburn', 'serving', null, 2_210_000)]),
    dublin: inventory('dublin', { maps: image('a', M), ...(fetched > 0 ? { agenda: image('b', A, fetched) } : {}) }, inDublin),
    tokyo: inventory('tokyo', { maps: image('a', M), agenda: image('b', A) }, inTokyo),
  };
  if (trouble) {
    seen.dublin.at = now - 12 * S;
    seen.tokyo.refused.agenda = 'machine m1 has 300 MiB free, an instance needs 512';
  }

  const crowd = ramp(t, T.crowd, T.crowd + 3) - ramp(t, T.ebb, T.ebb + 10);
  // Resolvers keep an answer for its TTL, so clients move over within 4 s, not at once.
  const moved = ramp(t, T.serves, T.clamped) - ramp(t, T.epoch, T.epoch + 4);
  const agendaMoved = ramp(t, T.agenda, T.agenda + 4) - ramp(t, T.back, T.back + 4);
  const rate = (service, region, per_s, elsewhere, share) => {
    const requests_per_100s = Math.round(per_s * 100 * wobble(elapsed, region.length + service.length));
    const there = Math.round(requests_per_100s * share);
    const networks = Object.fromEntries([['ashburn', requests_per_100s - there], [elsewhere, there]].filter(([, n]) => n > 0));
    return { service, region, requests_per_100s, networks };
  };
  const demand = [
    rate('maps', 'new-york', 6.2, 'dublin', 0),
    rate('maps', 'berlin', 3.4, 'dublin', 0),
    rate('maps', 'seoul', 2 + 39 * crowd, 'tokyo', moved),
    rate('maps', 'sao-paulo', 1.3, 'dublin', 0),
    rate('agenda', 'new-york', 1.1, 'dublin', 0),
    rate('agenda', 'berlin', 1.6, 'dublin', agendaMoved),
  ];
  const last = made.at(-1);
  const target = last && last.serving_at !== null ? last.plan.target : (made.at(-2)?.plan.target ?? placement(0, HOME, { ashburn: on(1), tokyo: 'dormant' }));
  // The union comes first: what is on its way stands in the placement from the moment of the decision.
  const union = last && last.serving_at === null ? { maps: t < T.order ? last.plan.target.services.maps : target.services.maps, agenda: last.plan.target.services.agenda } : target.services;
  const inForce = { generation: last ? (last.serving_at === null ? last.generation : last.plan.target.generation) : 0, services: union };
  const steering = { generation: inForce.generation, zone: FLEET.zone, ttl_s: FLEET.ttl_s, services: {} };
  return { at: now, fleet: FLEET, placement: inForce, inventory: seen, demand, steering, decisions: made };
}

/**
 * Serves the page and the story.
 * @returns the server, listening; `close()` also cuts the streams
 */
export async function serve({ port = 0, from = 0, speed = 1, trouble = false } = {}) {
  const start = performance.now();
  const began = Date.now() * 1000 - from * S;
  const world = () => snapshot(began, from + ((performance.now() - start) / 1000) * speed, { trouble });
  const server = createServer(async (request, response) => {
    const path = new URL(request.url, 'http://mock').pathname;
    const headers = { 'content-security-policy': POLICY, 'cache-control': 'no-cache', 'x-content-type-options': 'nosniff' };
    if (path === '/v1/snapshot') return response.writeHead(200, { ...headers, 'content-type': 'application/json' }).end(JSON.stringify(world()));
    if (path === '/v1/events') {
      response.writeHead(200, { ...headers, 'content-type': 'text/event-stream' });
      let newest = null;
      const tell = () => {
        const now = world();
        const last = now.decisions.at(-1)?.plan.id ?? 0;
        if (newest !== null && last > newest) response.write(`event: decision\ndata: ${JSON.stringify(now.decisions.at(-1))}\n\n`);
        newest = last;
        response.write(`event: snapshot\ndata: ${JSON.stringify(now)}\n\n`);
      };
      tell();
      const timer = setInterval(tell, 1000);
      return response.on('close', () => clearInterval(timer));
    }
    const name = path === '/' ? 'index.html' : path.slice(1);
    if (!/^[\w.]+$/.test(name)) return response.writeHead(404, headers).end();
    try {
      const body = await readFile(new URL(name, DIST));
      response.writeHead(200, { ...headers, 'content-type': TYPES[name.split('.').at(-1)] ?? 'application/octet-stream' }).end(body);
    } catch {
      response.writeHead(404, headers).end();
    }
  });
  await new Promise((resolve, reject) => server.once('error', reject).listen(port, '127.0.0.1', resolve));
  return { url: `http://127.0.0.1:${server.address().port}/`, port: server.address().port, close: () => new Promise((resolve) => (server.closeAllConnections(), server.close(resolve))) };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { values } = parseArgs({ options: { port: { type: 'string', default: '8449' }, from: { type: 'string', default: '0' }, speed: { type: 'string', default: '1' }, trouble: { type: 'boolean', default: false } } });
  const { url } = await serve({ port: Number(values.port), from: Number(values.from), speed: Number(values.speed), trouble: values.trouble });
  console.log(`the story is told at ${url}`);
}
