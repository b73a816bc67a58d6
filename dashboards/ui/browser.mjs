// The browser the checks and screenshots use: Debian's chromium, without a word to anyone outside.
import { chromium } from 'playwright-core';
import { existsSync } from 'node:fs';

const PATH = process.env.CHROMIUM ?? '/usr/bin/chromium';
const FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'];

/** Starts it. */
export async function browser() {
  if (!existsSync(PATH)) throw new Error(`there is no browser at ${PATH}; apt-get install chromium, or set CHROMIUM to one`);
  return chromium.launch({ executablePath: PATH, args: FLAGS });
}
