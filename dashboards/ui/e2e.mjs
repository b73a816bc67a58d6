// The page in a real browser against the mock: what an operator must see, and what must not happen.
//   node e2e.mjs           Each fact is printed; the first that fails ends it with 1.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { browser } from './browser.mjs';
import { serve, snapshot } from './mock.mjs';

const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const WAIT = { timeout: 15_000 };

async function fact(name, check) {
  const began = performance.now();
  await check();
  console.log(`ok  ${name} (${Math.round(performance.now() - began)} ms)`);
}

const b = await browser();
let mock = await serve({ from: 9 });
try {
  const foreign = [];
  const complaints = [];
  const open = async (url, options = {}) => {
    const context = await b.newContext({ viewport: { width: 1440, height: 900 }, ...options });
    const page = await context.newPage();
    page.on('request', (r) => r.url().startsWith(new URL(url).origin) || foreign.push(r.url()));
    page.on('console', (m) => m.type() === 'error' && complaints.push(m.text()));
    page.on('pageerror', (e) => complaints.push(e.message));
    await page.goto(url);
    return page;
  };
  const page = await open(mock.url);
  const tokyo = page.locator('[data-network=tokyo]');

  await fact('the map shows three networks and four regions', async () => {
    await tokyo.waitFor(WAIT);
    assert.equal(await page.locator('[data-network]').count(), 3);
    assert.equal(await page.locator('[data-region]').count(), 4);
    assert.equal(await tokyo.getAttribute('data-state'), 'dormant');
  });
  await fact('a decision appears with its reason, price and why not', async () => {
    const decision = page.locator('[data-decision="1"]');
    await decision.waitFor(WAIT);
    const text = await decision.innerText();
    for (const part of ['Crowd in seoul', 'tokyo', 'resume ×1', 'an hour', 'Why not 2 others']) assert.ok(text.includes(part), `${part} is not in: ${text}`);
  });
  await fact('a screen reader hears of it', async () => {
    await page.waitForFunction(() => /Decision 1\..*tokyo/.test(document.querySelector('[aria-live=polite]').textContent), null, WAIT);
  });
  await fact('the newcomer is seen resuming, then serving', async () => {
    await page.waitForSelector('[data-network=tokyo][data-state=resuming]', WAIT);
    await page.waitForSelector('[data-network=tokyo][data-state=serving]', WAIT);
  });
  await fact('by keyboard alone, the table lists what the map shows', async () => {
    await page.locator('input[name=view]').first().focus();
    await page.keyboard.press('ArrowRight');
    const tables = page.getByRole('region', { name: 'Tables' });
    await tables.waitFor(WAIT);
    const text = await tables.innerText();
    for (const part of ['ashburn', 'dublin', 'tokyo', 'seoul', 'sao-paulo', 'resume ×1', 'serving', 'dormant']) assert.ok(text.includes(part), `${part} is not in the table`);
    assert.match(page.url(), /#view=table$/);
  });
  await fact('one service alone can be looked at', async () => {
    await page.getByLabel('agenda', { exact: true }).check({ force: true });
    assert.ok(!(await page.getByRole('region', { name: 'Tables' }).innerText()).includes('maps'));
    assert.match(page.url(), /service=agenda/);
  });
  await fact('a link shows a colleague the same', async () => {
    const other = await open(page.url());
    await other.getByRole('region', { name: 'Tables' }).waitFor(WAIT);
    assert.ok(await other.getByLabel('agenda', { exact: true }).isChecked());
    await other.context().close();
  });
  await fact('nothing foreign was asked for, and the console is silent under a strict policy', async () => {
    assert.deepEqual(foreign, []);
    assert.deepEqual(complaints, []);
  });
  // In the middle of staging and with troubles, so that every hue is on the page.
  const busy = await serve({ from: 44, trouble: true });
  for (const colorScheme of ['dark', 'light']) {
    for (const view of ['map', 'table']) {
      await fact(`no accessibility rule is broken: ${colorScheme}, ${view}`, async () => {
        const looked = await open(`${busy.url}#view=${view}`, { colorScheme, bypassCSP: true, reducedMotion: 'reduce' });
        await looked.waitForSelector('main:not(.empty)', WAIT);
        await looked.evaluate(AXE);
        const { violations } = await looked.evaluate(() => globalThis.axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa'] }));
        assert.deepEqual(violations.map((v) => `${v.id}: ${v.nodes.map((n) => `${n.html.slice(0, 120)} ${n.any[0]?.message ?? ""}`).join(' | ')}`), []);
        await looked.context().close();
      });
    }
  }
  await busy.close();
  await fact('motion stops for those who ask', async () => {
    const still = await open(mock.url, { reducedMotion: 'reduce' });
    await still.waitForSelector('.drops', { ...WAIT, state: 'attached' });
    assert.equal(await still.evaluate(() => document.getAnimations().filter((a) => a.playState === 'running').length), 0);
    await still.context().close();
  });
  await fact('troubles are said in words', async () => {
    const ill = await serve({ trouble: true });
    const looked = await open(ill.url);
    await looked.getByText(/refuses agenda: machine m1 has 300 MiB free/).waitFor(WAIT);
    await looked.getByText(/its VM agent was last heard/).waitFor(WAIT);
    await looked.context().close();
    await ill.close();
  });
  await fact('what another version says is refused in words, and does not leave the page blank', async () => {
    for (const [said, words] of [[{ at: 1 }, /could not be read/], [{ ...snapshot(1.7e15, 2), decisions: [{}] }, /cannot show what the CPA said/]]) {
      const looked = await b.newPage();
      await looked.route('**/v1/events', (r) => r.fulfill({ contentType: 'text/event-stream', body: `event: snapshot\ndata: ${JSON.stringify(said)}\n\n` }));
      await looked.goto(mock.url);
      await looked.getByRole('alert').getByText(words).waitFor(WAIT);
      await looked.close();
    }
  });
  await fact('a lost CPA is told, and found again', async () => {
    const { port } = mock;
    await mock.close();
    await page.getByText('The CPA does not answer.').waitFor(WAIT);
    assert.ok((await page.getByRole('status').innerText()).includes('reconnecting'));
    mock = await serve({ port, from: 20 });
    await page.waitForFunction(() => /live/.test(document.querySelector('[role=status]').textContent), null, WAIT);
  });
} finally {
  await b.close();
  await mock.close();
}
