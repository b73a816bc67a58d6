import assert from 'node:assert/strict';
import { test } from 'node:test';
import { arc, at, fit, labels, spread } from '../src/layout.js';

const far = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);

test('every place of a fleet is inside the picture', () => {
  const places = [{ lat: 39, lon: -77 }, { lat: 35.7, lon: 139.7 }, { lat: -34, lon: 151 }, { lat: 64, lon: -21 }];
  for (const [w, h] of [[1000, 560], [380, 320], [1600, 500]]) {
    const v = fit(places, w, h);
    for (const p of places) {
      const { x, y } = at(v, p);
      assert.ok(x > 0 && x < w && y > 0 && y < h, `${w}x${h}: ${x} ${y}`);
    }
  }
});

test('a fleet within one country is shown larger than the world, but not as a street map', () => {
  const world = fit([{ lat: -40, lon: -150 }, { lat: 65, lon: 160 }], 1000, 500).k;
  const country = fit([{ lat: 52, lon: 13 }, { lat: 48, lon: 11 }], 1000, 500).k;
  assert.ok(country > 2 * world && country <= 4 * world, `${country} ${world}`);
});

test('marks of neighbouring cities do not cover each other, and remember where they belong', () => {
  const out = spread([{ id: 'a', x: 100, y: 100, r: 15, weight: 4 }, { id: 'b', x: 104, y: 98, r: 10, weight: 1 }, { id: 'c', x: 100, y: 100, r: 9, weight: 2 }]);
  for (const [i, a] of out.entries()) for (const b of out.slice(i + 1)) assert.ok(far(a, b) >= a.r + b.r, `${a.id} ${b.id} ${far(a, b)}`);
  assert.deepEqual([out[1].x0, out[1].y0], [104, 98]);
  assert.ok(far(out[0], { x: 100, y: 100 }) < far(out[1], { x: 104, y: 98 }), 'the heavier one moves less');
});

test('labels of neighbours keep clear of each other', () => {
  const size = { r: 10, w: 60, h: 15 };
  const sides = labels([{ id: 'a', x: 100, y: 100, ...size }, { id: 'b', x: 130, y: 100, ...size }], 400, 300);
  assert.notDeepEqual([sides.a.anchor, sides.a.y], [sides.b.anchor, sides.b.y]);
});

test('marks that touch have no line between them', () => {
  assert.equal(arc({ x: 0, y: 0, r: 10 }, { x: 15, y: 0, r: 10 }), null);
  assert.match(arc({ x: 0, y: 0, r: 10 }, { x: 100, y: 0, r: 10 }), /^M.+Q/);
});
