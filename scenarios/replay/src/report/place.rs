//! Where things stand on the map: latitude and longitude as they are (equirectangular), with the same scale both ways,
//! as large as the places of the fleet allow.
//!
//! ```text
//! (lat, lon) of every place ─▶ View ─▶ x, y of each; the graticule
//! marks and sizes of their words ─▶ labels: beside which mark, on which side
//! ```

use std::fmt::Write;

pub(super) const WIDTH: f64 = 960.0;
/// Around the outermost places: room for their names.
const MARGIN: (f64, f64) = (110.0, 56.0);
const HEIGHT: std::ops::RangeInclusive<f64> = 260.0..=520.0;
/// The least that is shown, degrees of latitude and longitude: places in one city must not be drawn as if they were
/// continents.
const SPAN_MIN: (f64, f64) = (1.0, 4.0);
/// Between two lines of the graticule, pixels at least.
const GRID_MIN: f64 = 80.0;

/// A part of the world, and how large it is drawn.
pub(super) struct View {
    /// Pixels a degree.
    scale: f64,
    west: f64,
    north: f64,
    pub height: f64,
}

impl View {
    /// The smallest part that holds all of some places, given as (lat, lon), with a margin.
    pub fn around(places: &[(f64, f64)]) -> View {
        let bounds = |of: fn(&(f64, f64)) -> f64, least: f64| {
            let all = || places.iter().map(of);
            let (low, high) = (all().reduce(f64::min).unwrap_or(0.0), all().reduce(f64::max).unwrap_or(0.0));
            ((low + high) / 2.0, (high - low).max(least))
        };
        let ((lat, tall), (lon, wide)) = (bounds(|p| p.0, SPAN_MIN.0), bounds(|p| p.1, SPAN_MIN.1));
        let scale = ((WIDTH - 2.0 * MARGIN.0) / wide).min((HEIGHT.end() - 2.0 * MARGIN.1) / tall);
        let height = (tall * scale + 2.0 * MARGIN.1).clamp(*HEIGHT.start(), *HEIGHT.end()).round();
        View { scale, west: lon - WIDTH / 2.0 / scale, north: lat + height / 2.0 / scale, height }
    }

    pub fn at(&self, lat: f64, lon: f64) -> (f64, f64) {
        ((lon - self.west) * self.scale, (self.north - lat) * self.scale)
    }

    /// Meridians and parallels at round degrees, within the world's bounds.
    pub fn graticule(&self) -> String {
        let steps = [1.0, 2.0, 5.0, 10.0, 15.0, 30.0];
        let step = steps.into_iter().find(|s| s * self.scale >= GRID_MIN).unwrap_or(30.0);
        let lines = |low: f64, high: f64| {
            let (first, last) = ((low / step).ceil() as i32, (high / step).floor() as i32);
            (first..=last).map(move |k| f64::from(k) * step)
        };
        let named = |degrees: f64, plus: char, minus: char| match degrees {
            0.0 => "0°".to_owned(),
            d => format!("{}° {}", d.abs(), if d > 0.0 { plus } else { minus }),
        };
        let (east, south) = (self.west + WIDTH / self.scale, self.north - self.height / self.scale);
        let (_, top) = self.at(self.north.min(90.0), 0.0);
        let (_, bottom) = self.at(south.max(-90.0), 0.0);
        let (left, _) = self.at(0.0, self.west.max(-180.0));
        let (right, _) = self.at(0.0, east.min(180.0));
        let mut out = String::new();
        // Writing to a String cannot fail.
        for lon in lines(self.west.max(-180.0), east.min(180.0)) {
            let (x, _) = self.at(0.0, lon);
            let _ = write!(
                out,
                "<line class='grid' x1='{x:.1}' x2='{x:.1}' y1='{top:.1}' y2='{bottom:.1}'/><text class='tick' x='{:.1}' y='{:.1}'>{}</text>",
                x + 4.0,
                self.height - 6.0,
                named(lon, 'E', 'W')
            );
        }
        for lat in lines(south.max(-90.0), self.north.min(90.0)) {
            let (_, y) = self.at(lat, 0.0);
            let _ = write!(
                out,
                "<line class='grid' x1='{left:.1}' x2='{right:.1}' y1='{y:.1}' y2='{y:.1}'/><text class='tick' x='4' y='{:.1}'>{}</text>",
                y - 4.0,
                named(lat, 'N', 'S')
            );
        }
        out
    }
}

/// A mark, and how much room its words need.
pub(super) struct Mark {
    pub x: f64,
    pub y: f64,
    /// Half of the mark's size.
    pub r: f64,
    pub width: f64,
    pub height: f64,
}

impl Mark {
    /// How lines of words in an area begin or end on the mark's side: `x` and `text-anchor`.
    pub fn anchored(&self, area: Area) -> String {
        if area.0 + area.2 <= self.x {
            format!("x='{:.1}' text-anchor='end'", area.0 + area.2)
        } else {
            format!("x='{:.1}'", area.0)
        }
    }
}

/// A rectangle: left, top, width, height.
pub(super) type Area = (f64, f64, f64, f64);

fn shared(a: Area, b: Area) -> f64 {
    let along = |a: f64, wide: f64, b: f64, wide_b: f64| ((a + wide).min(b + wide_b) - a.max(b)).max(0.0);
    along(a.0, a.2, b.0, b.2) * along(a.1, a.3, b.1, b.3)
}

/// Where the words of each mark go: to that side where they cover least of the marks, of the words before them and of
/// what lies outside; beginning with those that need most room.
pub(super) fn labels(marks: &[Mark], view: &View) -> Vec<Area> {
    let mut taken: Vec<Area> = marks.iter().map(|m| (m.x - m.r, m.y - m.r, 2.0 * m.r, 2.0 * m.r)).collect();
    let mut order: Vec<usize> = (0..marks.len()).collect();
    order.sort_by(|a, b| (marks[*b].height * marks[*b].width).total_cmp(&(marks[*a].height * marks[*a].width)));
    let mut placed = vec![(0.0, 0.0, 0.0, 0.0); marks.len()];
    for i in order {
        let m = &marks[i];
        let (right, left) = (m.x + m.r + 5.0, m.x - m.r - 5.0 - m.width);
        let (above, below) = (m.y - m.r - 2.0 - m.height, m.y + m.r + 2.0);
        let (middle, centre) = (m.y - m.height / 2.0, m.x - m.width / 2.0);
        let corners = [
            (right, middle),
            (left, middle),
            (centre, below),
            (centre, above),
            (right, below),
            (right, above),
            (left, below),
            (left, above),
        ];
        let covered = |(x, y): (f64, f64)| {
            let area = (x, y, m.width, m.height);
            let outside = m.width * m.height - shared(area, (0.0, 0.0, WIDTH, view.height));
            taken.iter().map(|t| shared(area, *t)).sum::<f64>() + 4.0 * outside
        };
        let best = corners.into_iter().min_by(|a, b| covered(*a).total_cmp(&covered(*b))).unwrap_or((right, middle));
        placed[i] = (best.0, best.1, m.width, m.height);
        taken.push(placed[i]);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ashburn, Dublin, Tokyo, New York, Berlin, Seoul, São Paulo.
    const PLACES: [(f64, f64); 7] =
        [(39.0, -77.5), (53.3, -6.3), (35.7, 139.7), (40.7, -74.0), (52.5, 13.4), (37.6, 127.0), (-23.5, -46.6)];

    #[test]
    fn every_place_is_on_the_map_within_its_margin() {
        for places in [&PLACES[..], &PLACES[..1], &[(90.0, 180.0), (-90.0, -180.0)], &[(1.0, 1.0), (1.0, 1.0)]] {
            let view = View::around(places);
            assert!(HEIGHT.contains(&view.height), "{}", view.height);
            for (lat, lon) in places {
                let (x, y) = view.at(*lat, *lon);
                assert!((MARGIN.0 - 0.6..=WIDTH - MARGIN.0 + 0.6).contains(&x), "{x}");
                assert!((MARGIN.1 - 0.6..=view.height - MARGIN.1 + 0.6).contains(&y), "{y}");
            }
        }
    }

    #[test]
    fn north_is_up_east_is_right_and_a_degree_is_a_degree() {
        let view = View::around(&PLACES);
        let ((x, y), (x2, y2)) = (view.at(10.0, 20.0), view.at(20.0, 30.0));
        assert!(x2 > x && y2 < y);
        assert!(((x2 - x) - (y - y2)).abs() < 1e-9);
    }

    #[test]
    fn the_graticule_has_some_lines_and_not_many() {
        for places in [&PLACES[..], &PLACES[..1], &[(90.0, 180.0), (-90.0, -180.0)]] {
            let lines = View::around(places).graticule().matches("<line").count();
            assert!((4..=40).contains(&lines), "{lines}");
        }
        assert!(View::around(&PLACES).graticule().contains(">60° W<"));
    }

    #[test]
    fn words_keep_clear_of_each_other() {
        let view = View::around(&PLACES);
        let mark = |(lat, lon): &(f64, f64)| {
            let (x, y) = view.at(*lat, *lon);
            Mark { x, y, r: 7.0, width: 90.0, height: 32.0 }
        };
        let marks: Vec<Mark> = PLACES.iter().map(mark).collect();
        let areas = labels(&marks, &view);
        for (i, a) in areas.iter().enumerate() {
            assert_eq!(areas.iter().skip(i + 1).map(|b| shared(*a, *b)).sum::<f64>(), 0.0, "{i}: {areas:?}");
            assert!(a.0 >= 0.0 && a.0 + a.2 <= WIDTH && a.1 >= 0.0 && a.1 + a.3 <= view.height, "{a:?}");
        }
    }
}
