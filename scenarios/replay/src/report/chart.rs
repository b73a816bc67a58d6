//! Charts over time as SVG text: one shared time axis, a few kinds of marks.
//!
//! ```text
//! Chart::new ─▶ shade, rule, mark, line, area, dots, bar ─▶ finish: <figure>
//! ```
//!
//! Colors are classes (`s0` to `s7` for series, `p0` to `p3` for parts of a sum), so that one style sheet serves light
//! and dark.

use std::fmt::Write;
use vmatrix_model::{Span, Time};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 26.0;
/// Colors a style sheet has for series; more series share them.
pub(super) const COLORS: usize = 8;
/// Plays from so long on have an axis in hours.
const LONG: Span = Span::secs(7200);

/// One chart while it is being drawn.
pub(super) struct Chart {
    title: String,
    about: String,
    length: Span,
    height: f64,
    /// Value at the top; the bottom is zero.
    top: f64,
    /// Names of areas, in their colors.
    key: String,
    body: String,
}

impl Chart {
    /// A chart of values from 0 to about `max` over `length`, with its axes.
    pub fn new(title: &str, about: &str, length: Span, height: f64, max: f64, unit: &str) -> Chart {
        let step = round_step(max / 4.0);
        let top = (max / step).ceil().max(1.0) * step;
        let mut chart = Chart::bare(title, about, length, height);
        chart.top = top;
        let mut value = 0.0;
        while value <= top + step / 2.0 {
            let y = chart.y(value);
            let label = format!(
                "{}{}",
                trimmed(value),
                if value + step > top + step / 2.0 { format!(" {unit}") } else { String::new() }
            );
            chart.put(format_args!("<line class='grid' x1='{LEFT}' x2='{:.1}' y1='{y:.1}' y2='{y:.1}'/><text class='tick' x='{:.1}' y='{:.1}' text-anchor='end'>{}</text>", WIDTH - RIGHT, LEFT - 6.0, y + 4.0, escape(&label)));
            value += step;
        }
        chart
    }

    /// A chart without a value axis, for rows of bars.
    pub fn bare(title: &str, about: &str, length: Span, height: f64) -> Chart {
        let mut chart = Chart {
            title: escape(title),
            about: escape(about),
            length,
            height,
            top: 1.0,
            key: String::new(),
            body: String::new(),
        };
        let (unit, seconds) = if length >= LONG { ("h", 3600.0) } else { ("s", 1.0) };
        let whole = length.as_secs_f64() / seconds;
        let step = round_step(whole / 8.0);
        let mut value = 0.0;
        while value <= whole {
            let x = chart.x(Time((value * seconds * 1e6) as u64));
            let unit = if value == 0.0 { format!(" {unit}") } else { String::new() };
            chart.put(format_args!(
                "<text class='tick' x='{x:.1}' y='{:.1}' text-anchor='middle'>{}{unit}</text>",
                height - 8.0,
                trimmed(value)
            ));
            value += step;
        }
        chart
    }

    fn x(&self, at: Time) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (at.0 as f64 / self.length.0.max(1) as f64).min(1.0)
    }

    fn y(&self, value: f64) -> f64 {
        let floor = self.height - BOTTOM;
        floor - (floor - TOP) * (value / self.top).clamp(0.0, 1.0)
    }

    fn put(&mut self, what: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(what);
    }

    /// Shades a stretch of time, behind everything drawn after it.
    pub fn shade(&mut self, from: Time, to: Time, name: &str) {
        let (x, width) = (self.x(from), (self.x(to) - self.x(from)).max(1.0));
        self.put(format_args!(
            "<rect class='shade' x='{x:.1}' y='{TOP}' width='{width:.1}' height='{:.1}'><title>{}</title></rect>",
            self.height - TOP - BOTTOM,
            escape(name)
        ));
    }

    /// A dashed line at a value.
    pub fn rule(&mut self, value: f64, name: &str) {
        let y = self.y(value);
        self.put(format_args!("<line class='rule' x1='{LEFT}' x2='{:.1}' y1='{y:.1}' y2='{y:.1}'/><text class='label' x='{:.1}' y='{:.1}' text-anchor='end'>{}</text>", WIDTH - RIGHT, WIDTH - RIGHT, y - 4.0, escape(name)));
    }

    /// A moment: a number at the top that the list of decisions repeats, and the map jumps to.
    pub fn mark(&mut self, at: Time, number: usize, name: &str) {
        let x = self.x(at);
        self.put(format_args!("<g class='jump' data-decision='{number}'><title>{}</title><line class='mark' x1='{x:.1}' x2='{x:.1}' y1='{TOP}' y2='{:.1}'/><circle class='flag' cx='{x:.1}' cy='14' r='9'/><text class='number' x='{x:.1}' y='18' text-anchor='middle'>{number}</text></g>", escape(name), self.height - BOTTOM));
    }

    /// A line through values over time, broken where there is none.
    pub fn line(&mut self, series: usize, name: &str, points: &[(Time, Option<f64>)]) {
        let mut path = String::new();
        let mut pen = "M";
        for (at, value) in points {
            let Some(value) = value else {
                pen = "M";
                continue;
            };
            let _ = write!(path, "{pen}{:.1} {:.1}", self.x(*at), self.y(*value));
            pen = "L";
        }
        self.put(format_args!(
            "<path class='line s{}' d='{path}'><title>{}</title></path>",
            series % COLORS,
            escape(name)
        ));
    }

    /// What lies between two lines through values at the same times.
    pub fn area(&mut self, part: usize, name: &str, low: &[(Time, f64)], high: &[(Time, f64)]) {
        let mut path = String::new();
        for (at, value) in high.iter().chain(low.iter().rev()) {
            let pen = if path.is_empty() { 'M' } else { 'L' };
            let _ = write!(path, "{pen}{:.1} {:.1}", self.x(*at), self.y(*value));
        }
        let name = escape(name);
        self.put(format_args!("<path class='area p{part}' d='{path}Z'><title>{name}</title></path>"));
        let _ = write!(self.key, "<li><span class='swatch p{part}'></span>{name}</li>");
    }

    /// One small dot per value.
    pub fn dots(&mut self, series: usize, points: &[(Time, f64)]) {
        let mut circles = String::new();
        for (at, value) in points {
            let _ = write!(circles, "<circle cx='{:.1}' cy='{:.1}' r='1.6'/>", self.x(*at), self.y(*value));
        }
        self.put(format_args!("<g class='dots s{}'>{circles}</g>", series % COLORS));
    }

    /// A bar in row `row` of `rows`.
    pub fn bar(&mut self, row: usize, rows: usize, from: Time, to: Time, name: &str) {
        let (x, width) = (self.x(from), (self.x(to) - self.x(from)).max(1.0));
        let room = (self.height - TOP - BOTTOM) / rows.max(1) as f64;
        self.put(format_args!(
            "<rect class='bar' x='{x:.1}' y='{:.1}' width='{width:.1}' height='{:.1}' rx='3'><title>{}</title></rect>",
            TOP + room * row as f64 + 3.0,
            room - 6.0,
            escape(name)
        ));
    }

    /// The name of the rows below, in the place of a row.
    pub fn heading(&mut self, row: usize, rows: usize, name: &str) {
        let room = (self.height - TOP - BOTTOM) / rows.max(1) as f64;
        let y = TOP + room * (row as f64 + 0.5);
        self.put(format_args!("<text class='heading' x='8' y='{:.1}'>{}</text>", y + 5.0, escape(name)));
    }

    /// The name of a row, before its beginning.
    pub fn row(&mut self, row: usize, rows: usize, name: &str) {
        let room = (self.height - TOP - BOTTOM) / rows.max(1) as f64;
        let y = TOP + room * (row as f64 + 0.5);
        self.put(format_args!("<line class='grid' x1='{LEFT}' x2='{:.1}' y1='{y:.1}' y2='{y:.1}'/><text class='tick' x='{:.1}' y='{:.1}' text-anchor='end'>{}</text>", WIDTH - RIGHT, LEFT - 6.0, y + 4.0, escape(name)));
    }

    /// The figure, ready to stand in a page.
    pub fn finish(self) -> String {
        let key = if self.key.is_empty() { String::new() } else { format!("<ul class='legend'>{}</ul>", self.key) };
        format!(
            "<figure><h2>{0}</h2>{key}<svg viewBox='0 0 {WIDTH} {1}' role='img' aria-label='{0}. {2}'><title>{0}</title><desc>{2}</desc>{3}</svg><figcaption>{2}</figcaption></figure>\n",
            self.title, self.height, self.about, self.body
        )
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn round_step(least: f64) -> f64 {
    let ten = 10_f64.powi(least.max(1e-6).log10().floor() as i32);
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|f| f * ten).find(|s| *s >= least).unwrap_or(ten * 10.0)
}

/// At most one decimal, and that only where it says something.
fn trimmed(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// Text as it may stand in HTML, between tags or in quotes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&#39;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_step_by_round_numbers() {
        assert_eq!([0.3, 1.0, 3.0, 18.75, 240.0].map(round_step), [0.5, 1.0, 5.0, 20.0, 500.0]);
    }

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(escape("<a href='x'>&"), "&lt;a href=&#39;x&#39;&gt;&amp;");
    }
}
