// Proves that ../dist is what this source builds, byte for byte.
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const dist = fileURLToPath(new URL('../dist/', import.meta.url));
const built = mkdtempSync(join(tmpdir(), 'vmatrix-dist-'));
try {
  execFileSync(process.execPath, [fileURLToPath(new URL('./node_modules/vite/bin/vite.js', import.meta.url)), 'build', '--logLevel', 'error'], { cwd: fileURLToPath(new URL('.', import.meta.url)), env: { ...process.env, DIST_DIR: built }, stdio: 'inherit' });
  const names = [...new Set([...readdirSync(dist), ...readdirSync(built)])].sort();
  const read = (folder, name) => {
    try {
      return readFileSync(join(folder, name));
    } catch {
      return null;
    }
  };
  const differ = names.filter((name) => {
    const [a, b] = [read(dist, name), read(built, name)];
    return a === null || b === null || !a.equals(b);
  });
  if (differ.length) {
    console.error(`dashboards/dist is not what dashboards/ui builds: ${differ.join(', ')} differ.\n\nhint: npm ci && npm run build, and commit dist`);
    process.exitCode = 1;
  } else {
    console.log(`dist is what the source builds: ${names.join(', ')}`);
  }
} finally {
  rmSync(built, { recursive: true, force: true });
}
