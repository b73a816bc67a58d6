// The CPA's events -> the page's state. Reconnects for ever, and says so.
//
//   connecting --snapshot--> live --silence or error--> lost --snapshot--> live
import { remember } from './history.js';

/** Snapshots come every second; after this silence the connection is made anew. Milliseconds. */
const SILENCE = 5000;
/** Waits between attempts, milliseconds; the last one repeats. */
const WAITS = [500, 1000, 2000, 5000];
/** As many as a snapshot carries. */
const DECISIONS_MAX = 50;

export class Stream {
  /** @type {'connecting' | 'live' | 'lost'} */
  state = $state('connecting');
  /** What the CPA last said, whole. */
  snapshot = $state.raw(null);
  samples = $state.raw([]);
  /** Why the connection is lost: what, and what to do next. */
  problem = $state.raw(null);
  /** The decision that has just been made, for screen readers. */
  news = $state.raw(null);

  #source = null;
  #attempt = 0;
  #timer = 0;
  /** An event that could not be read: a better reason than the silence that follows it. */
  #unread = null;

  open() {
    this.#source?.close();
    const source = new EventSource('/v1/events');
    this.#source = source;
    this.#watch(SILENCE, { problem: 'The CPA has been silent for 5 s.', hint: 'Trying again.' });
    source.addEventListener('snapshot', (e) => this.#take(e, (s) => this.#snapshot(s)));
    source.addEventListener('decision', (e) => this.#take(e, (d) => this.#decision(d)));
    source.onerror = () => this.#lost(null);
  }

  close() {
    this.#source?.close();
    clearTimeout(this.#timer);
  }

  #take(event, use) {
    try {
      use(JSON.parse(event.data));
    } catch (e) {
      this.#unread = { problem: `An event could not be read: ${e.message}`, hint: 'The page may be older than the CPA: reload it.' };
      this.problem = this.#unread;
    }
  }

  #snapshot(snapshot) {
    const known = this.snapshot === null ? null : new Set(this.snapshot.decisions.map((d) => d.plan.id));
    const newest = snapshot.decisions.at(-1);
    if (known && newest && !known.has(newest.plan.id)) this.news = newest;
    this.samples = remember(this.samples, snapshot);
    this.snapshot = snapshot;
    this.state = 'live';
    this.problem = null;
    this.#unread = null;
    this.#attempt = 0;
    this.#watch(SILENCE, { problem: 'The CPA has been silent for 5 s.', hint: 'Trying again.' });
  }

  #decision(decision) {
    if (this.snapshot === null) return;
    const others = this.snapshot.decisions.filter((d) => d.plan.id !== decision.plan.id);
    if (others.length === this.snapshot.decisions.length) this.news = decision;
    this.snapshot = { ...this.snapshot, decisions: [...others, decision].sort((a, b) => a.plan.id - b.plan.id).slice(-DECISIONS_MAX) };
  }

  #watch(wait, problem) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#lost(problem), wait);
  }

  async #lost(problem) {
    this.#source?.close();
    clearTimeout(this.#timer);
    if (this.state === 'live') this.state = 'lost';
    const wait = WAITS[Math.min(this.#attempt++, WAITS.length - 1)];
    this.#timer = setTimeout(() => this.open(), wait);
    // EventSource hides why it failed; a plain request tells.
    this.problem = this.#unread ?? problem ?? (await reason());
  }
}

/** What is wrong, in the CPA's words where it has any. */
async function reason() {
  try {
    const answer = await fetch('/v1/snapshot', { signal: AbortSignal.timeout(2000) });
    if (answer.ok) return { problem: 'The stream of events broke off.', hint: 'Trying again.' };
    const body = await answer.json().catch(() => null);
    return { problem: body?.problem ?? `The CPA answers ${answer.status}.`, hint: body?.hint ?? 'See the CPA’s log.' };
  } catch {
    return { problem: 'The CPA does not answer.', hint: 'Services go on with the last good placement. Is the CPA running? See its log.' };
  }
}
