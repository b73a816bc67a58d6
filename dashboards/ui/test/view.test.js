import assert from 'node:assert/strict';
import { test } from 'node:test';
import { snapshot } from '../mock.mjs';
import { prices, view } from '../src/view.js';

const BEGAN = 1.7e15;
const at = (s, more) => view(snapshot(BEGAN, s, more), null);
const network = (v, name) => v.networks.find((n) => n.name === name);

test('a network whose image sleeps is dormant, one that answers is serving', () => {
  const v = at(2);
  assert.equal(network(v, 'tokyo').state, 'dormant');
  assert.equal(network(v, 'ashburn').state, 'serving');
  assert.equal(network(v, 'ashburn').serving, 2);
});

test('a newcomer is seen resuming before it serves', () => {
  assert.equal(network(at(12.5), 'tokyo').state, 'resuming');
  assert.equal(network(at(16), 'tokyo').state, 'serving');
});

test('an image on its way shows how much is there', () => {
  const share = network(at(44), 'dublin').shares.find((s) => s.service === 'agenda');
  assert.equal(share.state, 'staging');
  assert.ok(share.staged > 0.3 && share.staged < 0.7, `${share.staged}`);
});

test('what regions ask is what arrives at networks', () => {
  const v = at(17);
  const sum = (list) => list.reduce((s, x) => s + x.requests, 0);
  assert.ok(sum(v.regions) > 0);
  assert.equal(sum(v.regions), sum(v.networks));
  assert.equal(sum(v.regions), sum(v.flows));
});

test('one service alone hides the other’s decisions and demand', () => {
  const s = snapshot(BEGAN, 60);
  const agenda = view(s, 'agenda');
  assert.deepEqual(agenda.decisions.map((d) => d.plan.id), [2]);
  assert.equal(agenda.regions.find((r) => r.name === 'seoul').requests, 0);
});

test('a quiet VM agent and a refusal are problems', () => {
  const v = at(2, { trouble: true });
  assert.equal(network(v, 'dublin').state, 'silent');
  assert.deepEqual(v.problems.map((p) => p.where), ['dublin', 'tokyo']);
});

test('a network never heard of is shown, not left out', () => {
  const s = snapshot(BEGAN, 2);
  delete s.inventory.tokyo;
  assert.equal(network(view(s, null), 'tokyo').state, 'silent');
});

test('decisions come newest first', () => {
  assert.deepEqual(at(140).decisions.map((d) => d.plan.id), [4, 3, 2, 1]);
});

test('a plan has one price from its first move to its last', () => {
  const p = (latency) => ({ latency, instances: 0, traffic: 0 });
  const move = (service, before, after) => ({ service, before: p(before), after: p(after) });
  assert.deepEqual(prices({ moves: [move('maps', 9, 7), move('maps', 7, 4)] }), [{ before: p(9), after: p(4), services: ['maps'] }]);
  assert.deepEqual(prices({ moves: [move('maps', 9, 4), move('agenda', 9, 4)] })[0].services, ['maps', 'agenda']);
  assert.deepEqual(prices({ moves: [move('maps', 0, 0)] }), []);
});
