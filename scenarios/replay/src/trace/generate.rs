//! Traces that nobody recorded, for the library: the same on every machine, from a kind and a seed.
//!
//! ```text
//! diurnal  ∿∿∿∿∿～～       a day's curve, less at weekends
//! flash    ∿∿│\∿∿∿～       and crowds out of nothing
//! stock    ∿∿∿∿∿＿＿       at work on weekdays (paper §6.1.1)
//! sport    ＿＿＿＿＿∿∿       and its opposite, at weekends
//! swell    ⌒               a rise and a fall over its whole length
//! ```
//!
//! Whole numbers only, and no sine of a library, which need not be the same in the next: a level is in millionths
//! ([`ONE`]), waves are Bhaskara's ratio of two squares, which is within 0.2 % of a sine, and crowds halve.

use super::{Trace, civil};
use crate::chance::Chance;
use vmatrix_model::Span;

/// Monday, 1 January 2001: what is generated begins with a week.
const BEGINS: i64 = 978_307_200;
const STEP_S: i64 = 60;
/// Requests of a minute at level 1: 100 a second, whose noise of 1.3 % a minute hides no curve.
const BASE: u64 = 6_000;
/// Level 1.
const ONE: u64 = 1_000_000;
/// The busiest hour of a day has three times the requests of the quietest: public logs of the Web have two to four.
const SWING: u64 = ONE / 2;
/// When a day's curve passes its mean upwards: its peak is six hours later, in the evening.
const MORNING_S: i64 = 14 * 3600;
/// What weekdays and weekends are of level 1. Mildly less at weekends; the two of the paper's pair peak at 100 and 5,
/// 10 and 100 (§6.1.1).
const USUAL: (u64, u64) = (ONE, ONE * 8 / 10);
const STOCK: (u64, u64) = (ONE, ONE * 5 / 100);
const SPORT: (u64, u64) = (ONE * 10 / 100, ONE);
/// Half of the time in which a weekday becomes a weekend: a step at midnight would be a crowd.
const TURN_S: i64 = 3 * 3600;
/// A swell is at most this much above 1: four times, as from one continent to most of the world.
const SWELL: u64 = 3 * ONE;
/// Longest trace: ten years by the minute are within what readers take.
pub const DAYS_MAX: u32 = 3_660;

/// What happens in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A day's curve, and less of it at weekends.
    Diurnal,
    /// The same, and crowds out of nothing.
    Flash(Crowd),
    /// Busy on weekdays, with a twentieth of that at weekends: one of an anti-phase pair.
    Stock,
    /// Busy at weekends, with a tenth of that on weekdays: the other one.
    Sport,
    /// A day's curve that slowly grows to four times and shrinks again.
    Swell,
}

/// A flash crowd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crowd {
    /// Since the beginning; `None` is once a day at a time that the seed draws.
    pub onset: Option<Span>,
    /// From onset to peak.
    pub rise: Span,
    /// Its peak in thousandths of what it would be without.
    pub peak: u64,
    /// In which what is more than usual halves, again and again.
    pub half_life: Span,
}

impl Crowd {
    /// Ten times in one minute, half of it gone after twenty: quicker than nine in ten of the crowds of public logs.
    pub const SUDDEN: Crowd = Crowd { onset: None, rise: Span::secs(60), peak: 10_000, half_life: Span::secs(20 * 60) };
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Diurnal => "diurnal",
            Kind::Flash(_) => "flash",
            Kind::Stock => "stock",
            Kind::Sport => "sport",
            Kind::Swell => "swell",
        }
    }
}

/// A trace by the minute of so many days (1 to [`DAYS_MAX`], taken to the nearest), from Monday 2001-01-01 on.
pub fn generate(kind: Kind, seed: u64, days: u32) -> Trace {
    let days = i64::from(days.clamp(1, DAYS_MAX));
    let steps = days * civil::DAY_S / STEP_S;
    let mut chance = Chance::named(seed, &["trace", kind.name(), "noise"]);
    let onsets = match kind {
        Kind::Flash(crowd) => onsets(crowd, seed, days),
        _ => vec![],
    };
    let counts = (0..steps).map(|i| {
        let since = i * STEP_S;
        let level = match kind {
            Kind::Diurnal => of_day(since, USUAL),
            Kind::Flash(crowd) => part(of_day(since, USUAL), ONE + above(crowd, &onsets, since)),
            Kind::Stock => of_day(since, STOCK),
            Kind::Sport => of_day(since, SPORT),
            Kind::Swell => {
                part(of_day(since, USUAL), ONE + part(SWELL, wave(since, 2 * steps * STEP_S).unsigned_abs()))
            }
        };
        noisy(part(BASE, level), &mut chance)
    });
    let counts = counts.collect();
    Trace { name: format!("{}-{seed}", kind.name()), begins: BEGINS, step: Span::secs(STEP_S as u64), counts }
}

/// `whole` times a level.
fn part(whole: u64, level: u64) -> u64 {
    u64::try_from(u128::from(whole) * u128::from(level) / u128::from(ONE)).unwrap_or(u64::MAX)
}

/// The level of a day's curve, on weekdays and at weekends.
fn of_day(since: i64, levels: (u64, u64)) -> u64 {
    let curve = (ONE as i64 + wave(since - MORNING_S, civil::DAY_S) * SWING as i64 / ONE as i64).unsigned_abs();
    let level = |at: i64| if civil::weekday(BEGINS + at) < 5 { levels.0 } else { levels.1 };
    // A mean of the levels around, so that midnight is halfway.
    let (early, late) = (level(since - TURN_S), level(since + TURN_S));
    let into = (since + TURN_S).rem_euclid(civil::DAY_S).min(2 * TURN_S).unsigned_abs();
    let turn = 2 * TURN_S.unsigned_abs();
    part((early * (turn - into) + late * into) / turn, curve)
}

/// A sine wave in millionths, by Bhaskara's 16·x·(π − x) / (5·π² − 4·x·(π − x)).
fn wave(at: i64, period: i64) -> i64 {
    let (at, half) = (at.rem_euclid(period), period / 2);
    let (x, sign) = if at < half { (at, 1) } else { (at - half, -1) };
    let (x, half) = (i128::from(x), i128::from(half));
    let product = x * (half - x);
    sign * (16 * product * i128::from(ONE) / (5 * half * half - 4 * product)) as i64
}

/// When crowds begin, seconds.
fn onsets(crowd: Crowd, seed: u64, days: i64) -> Vec<i64> {
    // Not in the first two hours, in which nobody knows yet what is usual.
    const QUIET_S: i64 = 2 * 3600;
    let mut chance = Chance::named(seed, &["trace", "flash", "onset"]);
    let drawn = |day: i64| day * civil::DAY_S + QUIET_S + chance.under((civil::DAY_S - QUIET_S) as u64) as i64;
    match crowd.onset {
        Some(onset) => vec![i64::try_from(onset.0 / 1_000_000).unwrap_or(i64::MAX)],
        None => (0..days).map(drawn).collect(),
    }
}

/// What crowds add to level 1.
fn above(crowd: Crowd, onsets: &[i64], since: i64) -> u64 {
    // Halved twenty times, a crowd is a millionth.
    const HALVINGS: u64 = 20;
    let (rise, half) = ((crowd.rise.0 / 1_000_000).max(1), (crowd.half_life.0 / 1_000_000).max(1));
    let height = crowd.peak.saturating_sub(1000).saturating_mul(ONE / 1000);
    let one = |onset: &i64| {
        let Ok(at) = u64::try_from(since.saturating_sub(*onset)) else { return 0 };
        let Some(falling) = at.checked_sub(rise) else { return ratio(height, at, rise) };
        let (halvings, rest) = (falling / half, falling % half);
        if halvings >= HALVINGS {
            return 0;
        }
        let top = height >> halvings;
        // A line between one halving and the next.
        top - ratio(top / 2, rest, half)
    };
    onsets.iter().map(one).fold(0, u64::saturating_add)
}

/// `whole` · `a` / `b`, with `a` at most `b`.
fn ratio(whole: u64, a: u64, b: u64) -> u64 {
    (u128::from(whole) * u128::from(a) / u128::from(b.max(1))) as u64
}

/// A number with the mean and the variance of a Poisson one. The sum of twelve even numbers is nearly normal, and a
/// level here has means of a hundred and more, where a Poisson number is too.
fn noisy(mean: u64, chance: &mut Chance) -> u64 {
    // From -6 to 6, with a variance of 1, in parts of 2^32.
    let normal = (0..12).map(|_| i128::from(chance.under(1 << 32))).sum::<i128>() - (6 << 32);
    // The square root of 2^16 times the mean is 2^8 times the deviation.
    let deviation = (normal * i128::from((u128::from(mean) << 16).isqrt() as u64)) >> (32 + 8);
    u64::try_from((i128::from(mean) + deviation).max(0)).unwrap_or(u64::MAX).min(super::COUNT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Kind; 5] = [Kind::Diurnal, Kind::Flash(Crowd::SUDDEN), Kind::Stock, Kind::Sport, Kind::Swell];

    fn of(trace: &Trace, hours: std::ops::Range<usize>) -> u64 {
        trace.counts[hours.start * 60..hours.end * 60].iter().sum::<u64>() / hours.len() as u64
    }

    #[test]
    fn the_same_seed_is_the_same_trace_everywhere() {
        let hashes = ALL.map(|kind| {
            let trace = generate(kind, 7, 14);
            trace.check().unwrap();
            assert_eq!(trace, generate(kind, 7, 14));
            assert_ne!(trace.counts, generate(kind, 8, 14).counts);
            trace.counts.iter().fold(0_u64, |h, c| (h ^ c).wrapping_mul(0x0100_0000_01b3))
        });
        // Written down on one machine: arithmetic that differs on another one fails here.
        assert_eq!(
            hashes,
            [
                14_278_165_632_215_509_753,
                15_673_484_432_680_107_661,
                14_427_762_641_327_477_898,
                15_155_639_731_168_580_984,
                8_065_961_307_395_595_704,
            ]
        );
        assert_eq!(generate(Kind::Diurnal, 1, 0).counts.len(), 1440);
    }

    #[test]
    fn a_wave_is_a_sine() {
        for degree in 0..360 {
            let right = f64::from(degree).to_radians().sin();
            let seen = wave(i64::from(degree), 360) as f64 / ONE as f64;
            assert!((right - seen).abs() < 0.002, "{degree}: {right} {seen}");
        }
    }

    #[test]
    fn evenings_are_three_times_mornings_and_weekends_a_little_less() {
        let trace = generate(Kind::Diurnal, 1, 7);
        let (evening, morning) = (of(&trace, 19..21), of(&trace, 7..9));
        assert!((29..31).contains(&(evening * 10 / morning)), "{evening} {morning}");
        let (wednesday, sunday) = (of(&trace, 48..72), of(&trace, 144..168));
        assert!((78..82).contains(&(sunday * 100 / wednesday)), "{sunday} {wednesday}");
        assert!(trace.describe().bursts.unwrap().is_empty());
        let noise =
            trace.counts.windows(2).map(|w| w[0].abs_diff(w[1]).pow(2)).sum::<u64>() / trace.counts.len() as u64;
        let mean = trace.describe().mean;
        assert!((18..22).contains(&(noise * 10 / mean)), "two Poisson numbers differ by √(2·mean): {noise} {mean}");
    }

    #[test]
    fn a_crowd_comes_as_it_was_ordered() {
        let onset = Span::secs(30 * 3600);
        let crowd = Crowd { onset: Some(onset), rise: Span::secs(600), peak: 5_000, half_life: Span::secs(3600) };
        let trace = generate(Kind::Flash(crowd), 3, 3);
        let usual = generate(Kind::Diurnal, 3, 3);
        let times = |minute: usize| {
            let five = minute - 2..minute + 3;
            trace.counts[five.clone()].iter().sum::<u64>() * 100 / usual.counts[five].iter().sum::<u64>()
        };
        let minute = 30 * 60;
        for (after, seen) in [(-10, 100), (20, 467), (70, 300), (130, 200), (12 * 60, 100)] {
            let ratio = times((minute + after) as usize);
            assert!(ratio.abs_diff(seen) <= 15, "{after} min after: {ratio} %, not {seen} %");
        }
        let bursts = generate(Kind::Flash(Crowd::SUDDEN), 3, 7).describe().bursts.unwrap();
        assert!((6..=7).contains(&bursts.len()), "one a day, two of which may be within three hours: {bursts:?}");
        assert!(bursts.iter().all(|b| (8_000..12_000).contains(&b.peak)), "{bursts:?}");
    }

    #[test]
    fn the_papers_pair_is_busy_when_the_other_is_not() {
        let (stock, sport) = (generate(Kind::Stock, 1, 7), generate(Kind::Sport, 1, 7));
        let (wednesday, sunday) = (48 + 19..48 + 21, 144 + 19..144 + 21);
        let ratio = |a: u64, b: u64| a * 100 / b;
        assert!((4..=6).contains(&ratio(of(&stock, 163..165), of(&stock, 67..69))));
        assert!((9..=11).contains(&ratio(of(&sport, wednesday.clone()), of(&sport, sunday.clone()))));
        assert!((98..=102).contains(&ratio(of(&stock, wednesday), of(&sport, sunday))));
        for trace in [stock, sport] {
            assert_eq!(trace.describe().bursts.unwrap(), [], "a weekend is no crowd");
        }
    }

    #[test]
    fn a_swell_is_slow_and_four_times_at_its_height() {
        let (swell, usual) = (generate(Kind::Swell, 1, 21), generate(Kind::Diurnal, 1, 21));
        let ratio = |hours: std::ops::Range<usize>| of(&swell, hours.clone()) * 100 / of(&usual, hours);
        assert!((395..=401).contains(&ratio(252..253)), "{}", ratio(252..253));
        assert!((99..=104).contains(&ratio(0..2)) && (99..=104).contains(&ratio(502..504)));
        assert_eq!(swell.describe().bursts.unwrap(), []);
    }
}
