// A picture of a running page:  node shot.mjs URL OUT.png [--light] [--size 1440x900] [--wait SECONDS]
import { parseArgs } from 'node:util';
import { browser } from './browser.mjs';

const { values, positionals } = parseArgs({ allowPositionals: true, options: { light: { type: 'boolean', default: false }, size: { type: 'string', default: '1440x900' }, wait: { type: 'string', default: '4' } } });
const [url, out] = positionals;
if (!url || !out) {
  console.error('usage: node shot.mjs URL OUT.png [--light] [--size 1440x900] [--wait SECONDS]');
  process.exit(2);
}
const [width, height] = values.size.split('x').map(Number);
const b = await browser();
try {
  const page = await b.newPage({ viewport: { width, height }, deviceScaleFactor: 2, colorScheme: values.light ? 'light' : 'dark' });
  await page.goto(url);
  await page.waitForSelector('main:not(.empty)', { timeout: 15_000 });
  await page.waitForTimeout(Number(values.wait) * 1000);
  await page.screenshot({ path: out });
} finally {
  await b.close();
}
