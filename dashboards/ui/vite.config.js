// Builds ../dist: index.html, app.js, app.css, LICENSES.txt. Names are stable, so a rebuild changes contents and nothing
// else; the CPA gives each file an ETag.
import { readdirSync, readFileSync } from 'node:fs';
import { defineConfig } from 'vite';
import { svelte } from '@sveltejs/vite-plugin-svelte';
import { geoGraticule, geoPath } from 'd3-geo';
import { feature } from 'topojson-client';
import { projection } from './src/projection.js';

/** `virtual:land`: coastlines and graticule as SVG paths, projected while building, so that the browser has nothing to compute. */
function land() {
  const id = '\0virtual:land';
  return {
    name: 'land',
    resolveId: (name) => (name === 'virtual:land' ? id : null),
    load(name) {
      if (name !== id) return null;
      const atlas = JSON.parse(readFileSync(new URL('./node_modules/world-atlas/land-110m.json', import.meta.url), 'utf8'));
      const world = feature(atlas, atlas.objects.land).features[0].geometry;
      // Antarctica is a third of the picture and no network is there.
      const coordinates = world.coordinates.filter(([ring]) => Math.max(...ring.map(([, lat]) => lat)) > -60);
      const path = geoPath(projection).digits(1);
      const lines = geoGraticule().step([30, 30]).extent([[-180, -60], [180, 85]])();
      return `export const coast = ${JSON.stringify(path({ type: 'MultiPolygon', coordinates }))};
export const graticule = ${JSON.stringify(path(lines))};`;
    },
  };
}

/** Emits the licences of everything that ends up in the bundle, the map's data too. */
function licences() {
  const modules = new URL('./node_modules/', import.meta.url);
  return {
    name: 'licences',
    generateBundle(_, bundle) {
      const ids = Object.values(bundle).flatMap((chunk) => chunk.moduleIds ?? []);
      const names = new Set(['world-atlas', ...ids.flatMap((id) => id.match(/node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1] ?? [])]);
      const parts = [...names].sort().map((name) => {
        const folder = new URL(`${name}/`, modules);
        const { version, license } = JSON.parse(readFileSync(new URL('package.json', folder), 'utf8'));
        const file = readdirSync(folder).find((f) => /^licen[cs]e/i.test(f));
        return `## ${name} ${version} (${license})\n\n${file ? readFileSync(new URL(file, folder), 'utf8').trim() : 'No licence text is distributed with it.'}\n`;
      });
      this.emitFile({ type: 'asset', fileName: 'LICENSES.txt', source: parts.join('\n') });
    },
  };
}

export default defineConfig({
  base: './',
  plugins: [land(), svelte(), licences()],
  build: {
    outDir: process.env.DIST_DIR ?? '../dist',
    emptyOutDir: true,
    target: 'es2022',
    modulePreload: false,
    assetsInlineLimit: 0,
    cssCodeSplit: false,
    rollupOptions: { output: { entryFileNames: 'app.js', assetFileNames: 'app[extname]', codeSplitting: false } },
  },
});
