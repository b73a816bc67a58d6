//! Dates and times of day in UTC, as traces write them: `1998-04-30 21:30:00`.
//!
//! No leap seconds: as in Unix time, every day has 86,400 s.

/// A day, in seconds.
pub const DAY_S: i64 = 86_400;
/// Days from 1 March of the year 0 to 1 January 1970.
const EPOCH: i64 = 719_468;
/// Days in 400 years, after which the calendar repeats itself.
const ERA: i64 = 146_097;
/// The first second that is not told any more: the year 10000 has a digit too many.
pub const END: i64 = 253_402_300_800;

/// Unix seconds of `YYYY-MM-DD HH:MM:SS` in UTC, from the year 1970 on; `None` if it is no such time.
pub fn seconds(text: &str) -> Option<i64> {
    let (date, time) = text.split_once(' ')?;
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
    let days = days(year, month, day);
    // 31 June is a day in July: what does not come back is no date.
    let real = date_of(days) == (year, month, day) && year >= 1970;
    (real && hour < 24 && minute < 60 && second < 60).then_some(days * DAY_S + hour * 3600 + minute * 60 + second)
}

/// `YYYY-MM-DD HH:MM:SS` in UTC.
pub fn written(seconds: i64) -> String {
    let (days, of_day) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
    let (year, month, day) = date_of(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// The day of the week: 0 is Monday.
pub fn weekday(seconds: i64) -> usize {
    // 1 January 1970 was a Thursday.
    (seconds.div_euclid(DAY_S) + 3).rem_euclid(7) as usize
}

/// Three numbers of exactly so many digits.
fn numbers(text: &str, between: char, digits: [usize; 3]) -> Option<[i64; 3]> {
    let mut parts = text.split(between);
    let mut all = [0; 3];
    for (number, digits) in all.iter_mut().zip(digits) {
        let part = parts.next().filter(|p| p.len() == digits && p.bytes().all(|b| b.is_ascii_digit()))?;
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(all)
}

/// Days since 1 January 1970. The year is taken to begin in March, so that a leap day is its last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    era * ERA + of_era * 365 + of_era / 4 - of_era / 100 + before(month) + day - 1 - EPOCH
}

/// Days of the year, from March on, before a month: the lengths 31 30 31 30 31 repeat every five months.
fn before(month: i64) -> i64 {
    ((month + 9).rem_euclid(12) * 153 + 2) / 5
}

/// The date of a day since 1 January 1970: the guess of its year from the mean length of one is one off at most.
fn date_of(since: i64) -> (i64, i64, i64) {
    let shifted = since + EPOCH;
    let guess = (shifted * 400).div_euclid(ERA);
    let year = if days(guess, 3, 1) > since { guess - 1 } else { guess };
    let year = if days(year + 1, 3, 1) <= since { year + 1 } else { year };
    let of_year = since - days(year, 3, 1);
    let month = (1..=12).rev().map(|m| (m + 1) % 12 + 1).find(|m| before(*m) <= of_year).unwrap_or(3);
    (year + i64::from(month <= 2), month, of_year - before(month) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times_are_where_they_belong() {
        for (text, unix, day) in [
            ("1970-01-01 00:00:00", 0, 3),
            ("1998-04-30 21:30:00", 893_971_800, 3),
            ("2000-02-29 23:59:59", 951_868_799, 1),
            ("2001-01-01 00:00:00", 978_307_200, 0),
            ("2001-09-09 01:46:40", 1_000_000_000, 6),
            ("9999-12-31 23:59:59", END - 1, 4),
        ] {
            assert_eq!(seconds(text), Some(unix), "{text}");
            assert_eq!(written(unix), text);
            assert_eq!(weekday(unix), day, "{text}");
        }
    }

    #[test]
    fn every_day_comes_back_and_follows_the_day_before() {
        let mut before = (1969, 12, 31);
        for day in 0..END / DAY_S {
            let date = date_of(day);
            assert_eq!(days(date.0, date.1, date.2), day);
            assert!(date > before, "{date:?} after {before:?}");
            before = date;
        }
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "1998-04-30",
            "1998-04-30T21:30:00",
            "1998-04-31 00:00:00",
            "1999-02-29 00:00:00",
            "1900-02-28 00:00:00",
            "1998-13-01 00:00:00",
            "1998-00-01 00:00:00",
            "1998-01-00 00:00:00",
            "1998-01-01 24:00:00",
            "1998-01-01 23:60:00",
            "1998-01-01 23:59:60",
            "1998-01-01 23:59:5",
            "+998-01-01 23:59:59",
            "1998-01-01 23:59:59Z",
            "1998-01-01-01 23:59:59",
        ] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }
}
