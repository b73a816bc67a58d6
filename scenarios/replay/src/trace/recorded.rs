//! What the recorded WorldCup98 trace must be, wherever it is at hand.

use super::*;
use std::path::PathBuf;

/// The trace, if this machine has it.
fn worldcup() -> Option<Imported> {
    let Some(data) = std::env::var_os("VMATRIX_DATA").map(PathBuf::from) else {
        eprintln!(
            "NOT TESTED on WorldCup98: VMATRIX_DATA does not name the folder of recorded data (docs/placement-data.md)"
        );
        return None;
    };
    Some(import(&data.join("worldcup98/invocation_count_per_min.csv.gz")).unwrap())
}

#[test]
fn it_is_read_with_its_seven_gaps() {
    let Some(Imported { trace, gaps }) = worldcup() else { return };
    assert_eq!((time_of(trace.begins), trace.step), ("1998-04-30 21:30:00".to_owned(), Span::secs(60)));
    assert_eq!((trace.counts.len(), gaps.0.len()), (125_310, 7));
    assert_eq!(gaps.0.iter().map(|g| g.steps).sum::<u64>(), 10);
    assert_eq!(trace.total(), 1_352_804_107);
    let mut written = vec![];
    trace.write("f", &mut written).unwrap();
    assert_eq!(parse("f", &written[..]).unwrap().trace, trace);
}

#[test]
fn it_has_eleven_bursts_once_the_known_artefact_is_masked() {
    let Some(Imported { trace, .. }) = worldcup() else { return };
    let at = |text| time(text).unwrap();
    let (masked, change) = trace.mask(at("1998-05-12 06:31:00"), at("1998-05-12 06:45:00")).unwrap();
    assert_eq!((change.steps, change.filling), (14, Filling::Days));
    assert!((10_000..25_000).contains(&change.now), "a thousand a minute or so: {change}");
    let mut peaks: Vec<u64> = masked.describe().bursts.unwrap().iter().map(|b| (b.peak + 50) / 100).collect();
    peaks.sort_unstable();
    assert_eq!((peaks.len(), peaks[5], peaks[10]), (11, 67, 121), "{}", masked.describe());
    assert_eq!(trace.describe().bursts.unwrap().len(), 12, "{}", trace.describe());
}

#[test]
fn nothing_in_it_is_a_run_that_chance_cannot_make() {
    let Some(Imported { trace, .. }) = worldcup() else { return };
    assert_eq!(trace.clean().1, []);
    // A counter that sticks for five minutes at that level would be found.
    let mut stuck = trace.clone();
    stuck.counts[16_391..16_396].fill(57_509);
    assert_eq!(stuck.clean().1.len(), 1);
}
