import assert from 'node:assert/strict';
import { test } from 'node:test';
import { snapshot } from '../mock.mjs';
import { lines, remember, WINDOW } from '../src/history.js';
import { bytes, rate, span, usd } from '../src/words.js';

const BEGAN = 1.7e15;

test('five minutes are kept, one sample a second', () => {
  let samples = [];
  for (let s = 0; s < 400; s += 0.5) samples = remember(samples, snapshot(BEGAN, s));
  assert.ok(samples.length <= 301 && samples.length >= 299, `${samples.length}`);
  assert.ok(samples.at(-1).at - samples[0].at <= WINDOW);
});

test('another run’s history is forgotten', () => {
  const samples = remember(remember([], snapshot(BEGAN + 1e9, 10)), snapshot(BEGAN, 10));
  assert.equal(samples.length, 1);
});

test('lines add up the chosen services', () => {
  const samples = remember([], snapshot(BEGAN, 2));
  const at = (services) => lines(samples, 'serving', services, ['ashburn'])[0].points[0][1];
  assert.equal(at(['maps']), 1);
  assert.equal(at(['maps', 'agenda']), 2);
});

test('figures have units and no more digits than they mean', () => {
  assert.deepEqual([rate(40), rate(4100), rate(1_230_000)], ['0.4', '41', '12.3k']);
  assert.deepEqual([span(900), span(3.4e6), span(42e6), span(3600e6)], ['900 µs', '3.4 s', '42 s', '60 min']);
  assert.deepEqual([usd(0), usd(-13_210_000), usd(60000)], ['$0', '−$13.21', '$0.060']);
  assert.equal(bytes(158 << 20), '158 MiB');
});
