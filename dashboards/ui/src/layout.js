// Places on earth -> marks and labels on the screen that do not cover one another. Pure.
import { projection, WORLD } from './projection.js';

/** The closest the map comes: at 4, the world would be 4 times as wide as the picture. */
const ZOOM_MAX = 4;
/** Share of the picture kept free around the outermost marks, for their labels. */
const MARGIN = 0.14;

/**
 * The view of the map that shows every place: `screen = k * unit + t`.
 * @param {{lat: number, lon: number}[]} places
 */
export function fit(places, width, height) {
  const worldWidth = WORLD.x1 - WORLD.x0;
  const worldHeight = WORLD.y1 - WORLD.y0;
  const whole = Math.min(width / worldWidth, height / worldHeight);
  const points = places.map((p) => projection([p.lon, p.lat]));
  const xs = points.map((p) => p[0]);
  const ys = points.map((p) => p[1]);
  const [x0, x1, y0, y1] = points.length ? [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)] : [WORLD.x0, WORLD.x1, WORLD.y0, WORLD.y1];
  const inner = 1 - 2 * MARGIN;
  const wanted = Math.min((width * inner) / Math.max(x1 - x0, 1), (height * inner) / Math.max(y1 - y0, 1));
  const k = Math.max(whole, Math.min(wanted, whole * ZOOM_MAX));
  // Centred on the places, but the picture never leaves the world where the world is larger than the picture.
  const shift = (low, high, worldLow, worldHigh, size) => {
    const t = size / 2 - (k * (low + high)) / 2;
    const [a, b] = [size - k * worldHigh, -k * worldLow];
    return a <= b ? Math.min(b, Math.max(a, t)) : (a + b) / 2;
  };
  return { k, tx: shift(x0, x1, WORLD.x0, WORLD.x1, width), ty: shift(y0, y1, WORLD.y0, WORLD.y1, height) };
}

/** Where a place is on the screen. */
export function at(view, place) {
  const [x, y] = projection([place.lon, place.lat]);
  return { x: view.k * x + view.tx, y: view.k * y + view.ty };
}

/** Rounds of pushing; a dozen settles marks of a crowded coast, more changes nothing one can see. */
const ROUNDS = 24;

/**
 * Pushes marks apart that would overlap. `x0, y0` keep the true place, for a leader line.
 * @param {{id: string, x: number, y: number, r: number, weight: number}[]} marks heavier ones move less
 */
export function spread(marks, gap = 4) {
  const out = marks.map((m) => ({ ...m, x0: m.x, y0: m.y }));
  for (let round = 0; round < ROUNDS; round++) {
    for (let i = 0; i < out.length; i++) {
      for (let j = i + 1; j < out.length; j++) {
        const [a, b] = [out[i], out[j]];
        let [dx, dy] = [b.x - a.x, b.y - a.y];
        const far = Math.hypot(dx, dy);
        const overlap = a.r + b.r + gap - far;
        if (overlap <= 0) continue;
        if (far < 0.01) [dx, dy] = [1, 0];
        else [dx, dy] = [dx / far, dy / far];
        const share = b.weight / (a.weight + b.weight);
        a.x -= dx * overlap * share;
        a.y -= dy * overlap * share;
        b.x += dx * overlap * (1 - share);
        b.y += dy * overlap * (1 - share);
      }
    }
  }
  return out;
}

/** What a box shares with another, in square pixels. */
const shared = (a, b) => Math.max(0, Math.min(a.x1, b.x1) - Math.max(a.x0, b.x0)) * Math.max(0, Math.min(a.y1, b.y1) - Math.max(a.y0, b.y0));

/**
 * Finds a side for each mark's label, first come first served: the side that covers least of marks, labels and border.
 * @param {{id: string, x: number, y: number, r: number, w: number, h: number}[]} marks `w`, `h`: size of the label
 * @returns {Record<string, {x: number, y: number, anchor: 'start' | 'middle' | 'end'}>} `y` is the label's top
 */
export function labels(marks, width, height) {
  const taken = marks.map((m) => ({ x0: m.x - m.r, y0: m.y - m.r, x1: m.x + m.r, y1: m.y + m.r }));
  const out = {};
  for (const m of marks) {
    const far = m.r + 5;
    const slant = m.r * 0.7 + 4;
    const sides = [
      { anchor: 'middle', x: m.x, y: m.y + far - 1 },
      { anchor: 'middle', x: m.x, y: m.y - far - m.h + 1 },
      { anchor: 'start', x: m.x + far, y: m.y - m.h / 2 },
      { anchor: 'end', x: m.x - far, y: m.y - m.h / 2 },
      { anchor: 'start', x: m.x + slant, y: m.y + slant - 4 },
      { anchor: 'end', x: m.x - slant, y: m.y + slant - 4 },
      { anchor: 'start', x: m.x + slant, y: m.y - slant - m.h + 4 },
      { anchor: 'end', x: m.x - slant, y: m.y - slant - m.h + 4 },
    ];
    let best = null;
    for (const side of sides) {
      const x0 = side.anchor === 'start' ? side.x : side.anchor === 'end' ? side.x - m.w : side.x - m.w / 2;
      const box = { x0, y0: side.y, x1: x0 + m.w, y1: side.y + m.h };
      const inside = shared(box, { x0: 2, y0: 2, x1: width - 2, y1: height - 2 });
      const cost = taken.reduce((sum, t) => sum + shared(box, t), 0) + 4 * (m.w * m.h - inside);
      if (best === null || cost < best.cost - 0.5) best = { cost, side, box };
    }
    taken.push(best.box);
    out[m.id] = best.side;
  }
  return out;
}

/** A curve from one mark's rim to another's, or nothing where the marks touch. */
export function arc(from, to) {
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const far = Math.hypot(dx, dy);
  if (far < from.r + to.r + 2) return null;
  const bend = Math.min(0.22 * far, 110);
  // Always bent towards the north: arcs that rise read as a route, arcs that sag read as a cable.
  const up = dx >= 0 ? 1 : -1;
  const c = { x: (from.x + to.x) / 2 + (dy / far) * bend * up, y: (from.y + to.y) / 2 - (dx / far) * bend * up };
  const rim = (p, r) => {
    const d = Math.hypot(c.x - p.x, c.y - p.y) || 1;
    return [p.x + ((c.x - p.x) / d) * r, p.y + ((c.y - p.y) / d) * r];
  };
  const n = (v) => v.toFixed(1);
  const [ax, ay] = rim(from, from.r + 1);
  const [bx, by] = rim(to, to.r + 3);
  return `M${n(ax)} ${n(ay)}Q${n(c.x)} ${n(c.y)} ${n(bx)} ${n(by)}`;
}
