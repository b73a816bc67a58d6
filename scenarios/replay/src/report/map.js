// Plays the map of a report.
//
//   frames (JSON of the page) ─▶ show(now): what is where, circles, lines, in words ─┐
//   the page's list of decisions ─▶ the newest one, as it stands there ──────────────┴▶ the section #map
//   play, slider, a decision's number ─▶ now
//
// Every text is set as text or copied from the page: nothing here makes markup.
(() => {
  'use strict';
  const by = (id) => document.getElementById(id);
  const { length_s, services, networks, crowds, decisions, frames } = JSON.parse(by('frames').textContent);
  const map = by('map');
  const all = (what) => [...map.querySelectorAll(what)];
  const [squares, regions, rates, held] = [all('.network'), all('.region'), all('.rate'), all('.held')];
  const names = held.map((text) => text.textContent);
  const entries = [...document.querySelectorAll('.decisions > li')];
  const still = matchMedia('(prefers-reduced-motion: reduce)');
  const most = frames.reduce((most, f) => Math.max(most, ...f.demand), 1e-9);
  const GLYPHS = { absent: '', staging: '◌', dormant: '○', resuming: '◐', active: '●' };
  /** Radius of a circle of the highest demand, and of the least that is seen. */
  const [LARGE, SMALL] = [30, 5];

  let now = 0;
  let told = null;
  let playing = null;

  const clock = (s) => [s / 3600, (s / 60) % 60, s % 60].map((n, i) => String(Math.floor(n)).padStart(i ? 2 : 1, '0')).join(':');
  const newest = (times, at) => times.findLastIndex((t) => t <= at);
  const times = frames.map((f) => f.at_s);
  const put = (node, set) => Object.entries(set).forEach(([name, value]) => node.setAttribute(name, value));
  // `active` comes with a number, the other states are words.
  const read = (state) => (typeof state === 'string' ? [state, ''] : ['active', ` ×${state.active}`]);

  const line = ([r, n, share]) => {
    const [from, to] = [regions[r].dataset, squares[n].dataset];
    const line = document.createElementNS(map.querySelector('svg').namespaceURI, 'line');
    put(line, { class: `flow s${r % 8}`, x1: from.x, y1: from.y, x2: to.x, y2: to.y, 'stroke-width': 1 + 6 * share });
    return line;
  };

  const draw = (frame) => {
    held.forEach((text, i) => {
      const [word, count] = read(frame.held[Math.floor(i / services.length)][i % services.length]);
      text.setAttribute('class', `held ${word}`);
      text.textContent = word === 'absent' ? '' : `${GLYPHS[word]} ${names[i]}${count}`;
    });
    squares.forEach((square, n) => square.classList.toggle('active', frame.held[n].some((s) => read(s)[0] === 'active')));
    regions.forEach((region, r) => {
      const [demand, crowd] = [frame.demand[r], crowds.some((c) => c.region === r && c.from_s <= now && now < c.to_s)];
      const radius = demand > 0 ? SMALL + (LARGE - SMALL) * Math.sqrt(demand / most) : 0;
      put(region.querySelector('.demand'), { r: radius });
      put(region.querySelector('.crowd'), { r: crowd ? radius + 6 : 0 });
      region.classList.toggle('bad', frame.failed[r] > 0);
      rates[r].textContent = demand > 0 ? `${demand.toFixed(1)}/s${frame.failed[r] > 0 ? `, ${frame.failed[r].toFixed(1)} fail` : ''}` : '';
    });
    map.querySelector('.flows').replaceChildren(...frame.served.map(line));
    by('told').textContent = services.map((service, s) => {
      const where = networks.map((network, n) => [network, ...read(frame.held[n][s])]).filter(([, word]) => word !== 'absent');
      return `${service}: ${where.map(([network, word, count]) => `${word}${count} at ${network}`).join(', ') || 'nowhere'}.`;
    }).join(' ');
  };

  const tell = (number) => {
    if (number === told) return;
    told = number;
    const heading = document.createElement('h3');
    heading.textContent = number < 0 ? 'Nothing is decided yet' : `Decision ${number + 1}`;
    by('moment').replaceChildren(heading, ...(number < 0 ? [] : entries[number].cloneNode(true).childNodes));
  };

  let drawn = null;
  const show = () => {
    const frame = Math.max(0, newest(times, now));
    // Crowds begin and end between frames too.
    const scene = `${frame} ${crowds.map((c) => c.from_s <= now && now < c.to_s)}`;
    if (scene !== drawn) draw(frames[frame]);
    drawn = scene;
    const slider = by('time');
    slider.value = (now / length_s) * slider.max;
    slider.setAttribute('aria-valuetext', clock(now));
    by('clock').textContent = clock(now);
    const number = newest(decisions, now);
    tell(number);
    by('back').disabled = number < 0;
    by('on').disabled = number + 1 >= decisions.length;
  };
  const go = (at) => {
    now = Math.min(Math.max(at, 0), length_s);
    show();
  };

  const pause = () => {
    if (playing) cancelAnimationFrame(playing);
    playing = null;
    by('play').textContent = 'Play';
  };
  const play = () => {
    if (now >= length_s) now = 0;
    by('play').textContent = 'Pause';
    let [last, shown] = [performance.now(), 0];
    const next = (at) => {
      // A tab in the background gets no frames: it goes on from where it was.
      now = Math.min(now + (Math.min(Math.max(at - last, 0), 250) / 1000) * (length_s / by('speed').value), length_s);
      last = at;
      // Who wants little motion gets a picture a second.
      if (!still.matches || at - shown >= 1000 || now >= length_s) {
        show();
        shown = at;
      }
      if (now >= length_s) pause();
      else playing = requestAnimationFrame(next);
    };
    playing = requestAnimationFrame(next);
  };
  const jump = (number) => {
    pause();
    go(decisions[number]);
  };

  by('play').addEventListener('click', () => (playing ? pause() : play()));
  by('time').addEventListener('input', (e) => {
    pause();
    go((e.target.value / e.target.max) * length_s);
  });
  by('back').addEventListener('click', () => {
    // To the decision that is shown, if its time has passed; else to the one before.
    const number = newest(decisions, now);
    jump(now > decisions[number] ? number : Math.max(0, number - 1));
  });
  by('on').addEventListener('click', () => jump(newest(decisions, now) + 1));
  document.addEventListener('click', (e) => {
    const mark = e.target.closest('[data-decision]');
    if (!mark) return;
    e.preventDefault();
    jump(mark.dataset.decision - 1);
    map.scrollIntoView({ block: 'start' });
    by('time').focus({ preventScroll: true });
  });
  map.querySelector('.controls').hidden = false;
  show();
})();
