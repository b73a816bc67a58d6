//! Worlds to place in: client prefixes and networks where people are.
//!
//! ```text
//!  blocks of addresses (country) ─┐   a city of the country, by people^0.8 ─▶ prefix
//!  cities (people, place) ────────┴▶  any city, by people^0.8 ─────────────▶ network
//!  way = great circle at 2/3 of light, there and back, × 1.5 for detours, + 2..10 ms access
//! ```
//! Without recorded data the countries, cities and blocks are drawn; everything else is the same.

use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;
use vmatrix_cpa_core::greedy::Graph;
use vmatrix_replay::chance::Chance;
use vmatrix_replay::prefixes::{self, Country};

/// People count for less where there are many of them: one connection serves more of them.
const PEOPLE: f64 = 0.8;
/// Microseconds there and back for a kilometre: 200 km/ms in glass, and cables half as long again as the great circle.
const US_PER_KM: f64 = 15.0;
const EARTH_KM: f64 = 6371.0;

/// Who counts as a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The nearest networks, and each prefix must be served by one of them.
    Nearest,
    /// The nearest but one, and network 0, where the service runs anyway and costs nothing more.
    Origin,
    /// As [`Kind::Nearest`], with an access delay drawn for each pair instead of one for each end: no two prefixes are alike.
    Pair,
}

/// A point on the unit sphere.
type Spot = [f64; 3];

/// Cities and blocks, recorded or drawn.
pub struct Atlas {
    /// Country and place of every city, and the running sum of people^0.8.
    cities: Vec<(Country, Spot, f64)>,
    /// For each country the cities it has, with their own running sums.
    within: BTreeMap<Country, Vec<(usize, f64)>>,
    blocks: Vec<Country>,
    /// Where it comes from.
    pub source: &'static str,
}

/// A graph, and the country of each prefix.
pub struct World {
    pub graph: Graph,
    pub countries: Vec<Country>,
    /// Prefixes in the order of their place, for crowds that are in one region.
    pub by_place: Vec<u32>,
    /// Whether network 0 is where the service runs anyway.
    pub origin: bool,
}

impl Atlas {
    /// From the folder of recorded data, or drawn with the seed if there is none.
    ///
    /// # Errors
    /// The data is there and cannot be read.
    pub fn new(data: Option<&Path>, seed: u64) -> Result<Atlas> {
        let files = data.map(|d| (d.join(prefixes::BLOCKS), d.join(prefixes::CITIES)));
        match files.filter(|(b, c)| b.exists() && c.exists()) {
            Some((blocks, cities)) => {
                let blocks = prefixes::blocks(&blocks)?.into_iter().map(|b| b.country).collect();
                let cities = prefixes::cities(&cities)?.into_iter().filter(|c| c.population > 0);
                let spot = |lat: i32, lon: i32| spot(f64::from(lat) / 1e5, f64::from(lon) / 1e5);
                let cities = cities.map(|c| (c.country, spot(c.latitude, c.longitude), c.population as f64));
                Ok(Atlas::of(cities.collect(), blocks, "recorded: iplocdb blocks, GeoNames cities"))
            }
            None => Ok(Atlas::drawn(seed)),
        }
    }

    /// 200 countries of 300 cities, sizes by Zipf's law, cities within some 1,500 km of their country's middle.
    fn drawn(seed: u64) -> Atlas {
        let mut chance = Chance::named(seed, &["atlas"]);
        let (mut cities, mut blocks) = (Vec::new(), Vec::new());
        for number in 0..200_u32 {
            let country = [b'A' + (number / 26) as u8, b'a' + (number % 26) as u8];
            let (lat, lon) = (chance.fraction() * 120.0 - 60.0, chance.fraction() * 360.0 - 180.0);
            for city in 0..300 {
                let off = |chance: &mut Chance| (chance.fraction() + chance.fraction() - 1.0) * 15.0;
                let place = spot((lat + off(&mut chance)).clamp(-89.0, 89.0), lon + off(&mut chance));
                cities.push((country, place, 2e7 / f64::from(number + 1).sqrt() / f64::from(city + 1)));
            }
            blocks.extend((0..40_000 / (number + 1)).map(|_| country));
        }
        Atlas::of(cities, blocks, "drawn: no recorded data")
    }

    fn of(cities: Vec<(Country, Spot, f64)>, blocks: Vec<Country>, source: &'static str) -> Atlas {
        let (mut sum, mut within) = (0.0, BTreeMap::<Country, Vec<(usize, f64)>>::new());
        let mut summed = Vec::with_capacity(cities.len());
        for (i, &(country, place, people)) in cities.iter().enumerate() {
            let weight = people.powf(PEOPLE);
            sum += weight;
            summed.push((country, place, sum));
            let of_country = within.entry(country).or_default();
            let before = of_country.last().map_or(0.0, |c| c.1);
            of_country.push((i, before + weight));
        }
        Atlas { cities: summed, within, blocks, source }
    }

    fn any_city(&self, chance: &mut Chance) -> usize {
        let drawn = chance.fraction() * self.cities.last().map_or(0.0, |c| c.2);
        self.cities.partition_point(|c| c.2 < drawn).min(self.cities.len() - 1)
    }

    fn city_in(&self, country: Country, chance: &mut Chance) -> usize {
        let Some(cities) = self.within.get(&country) else { return self.any_city(chance) };
        let drawn = chance.fraction() * cities.last().map_or(0.0, |c| c.1);
        cities[cities.partition_point(|c| c.1 < drawn).min(cities.len() - 1)].0
    }

    /// Draws so many networks, and prefixes with so many candidates each.
    ///
    /// # Errors
    /// The graph refuses what was drawn.
    pub fn world(&self, kind: Kind, networks: usize, prefixes: usize, candidates: usize, seed: u64) -> Result<World> {
        let mut chance = Chance::named(seed, &["networks"]);
        let sites: Vec<(Spot, u32)> = (0..networks)
            .map(|_| (self.cities[self.any_city(&mut chance)].1, 1000 + chance.under(4001) as u32))
            .collect();
        let mut chance = Chance::named(seed, &["prefixes"]);
        // Real blocks without repetition: the first draws of a shuffle.
        let mut blocks = self.blocks.clone();
        let wanted = prefixes.min(blocks.len());
        for i in 0..wanted {
            let j = i + chance.under((blocks.len() - i) as u64) as usize;
            blocks.swap(i, j);
        }
        blocks.truncate(wanted);
        let homes: Vec<(usize, u32)> =
            blocks.iter().map(|&b| (self.city_in(b, &mut chance), 1000 + chance.under(4001) as u32)).collect();
        let mut by_place: Vec<u32> = (0..wanted as u32).collect();
        by_place.sort_by_key(|&p| homes[p as usize].0);

        let grid = Grid::new(&sites, candidates);
        let (near, mut chance) = (candidates - usize::from(kind == Kind::Origin), Chance::named(seed, &["access"]));
        let mut rows: Vec<Vec<(u32, u32)>> = vec![Vec::new(); wanted];
        let (mut city, mut found) = (usize::MAX, Vec::new());
        for &prefix in &by_place {
            let (home, last_mile) = homes[prefix as usize];
            if home != city {
                (city, found) = (home, grid.nearest(&self.cities[home].1, near));
                if kind == Kind::Origin && found.iter().all(|f| f.0 != 0) {
                    found.push((0, way(&self.cities[home].1, &sites[0].0)));
                }
            }
            let access = |n: u32, chance: &mut Chance| match kind {
                Kind::Pair => 2000 + chance.under(8001) as u32,
                _ => sites[n as usize].1 + last_mile,
            };
            rows[prefix as usize] = found.iter().map(|&(n, way)| (n, way + access(n, &mut chance))).collect();
        }
        Ok(World {
            graph: Graph::new(networks as u32, &rows)?,
            countries: blocks,
            by_place,
            origin: kind == Kind::Origin,
        })
    }
}

fn spot(lat: f64, lon: f64) -> Spot {
    let (lat, lon) = (lat.to_radians(), lon.to_radians());
    [lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()]
}

fn chord2(a: &Spot, b: &Spot) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// Microseconds there and back without access.
fn way(a: &Spot, b: &Spot) -> u32 {
    let angle = 2.0 * (chord2(a, b).sqrt() / 2.0).min(1.0).asin();
    (angle * EARTH_KM * US_PER_KM) as u32
}

/// Networks by cell of a cube around the sphere, so that the nearest are found by looking at few.
struct Grid<'a> {
    sites: &'a [(Spot, u32)],
    side: i32,
    cells: Vec<Vec<u32>>,
}

impl Grid<'_> {
    /// Cells half as wide as the circle that would hold the wanted number were networks spread evenly.
    fn new(sites: &[(Spot, u32)], wanted: usize) -> Grid<'_> {
        let radius = (4.0 * wanted as f64 / sites.len() as f64).sqrt();
        let side = (4.0 / radius).clamp(1.0, 64.0) as i32;
        let mut grid = Grid { sites, side, cells: vec![Vec::new(); (side * side * side) as usize] };
        for (i, (site, _)) in sites.iter().enumerate() {
            let at = grid.cell(grid.axes(site));
            grid.cells[at].push(i as u32);
        }
        grid
    }

    fn axes(&self, spot: &Spot) -> [i32; 3] {
        spot.map(|x| (((x + 1.0) / 2.0 * f64::from(self.side)) as i32).min(self.side - 1))
    }

    fn cell(&self, [x, y, z]: [i32; 3]) -> usize {
        ((x * self.side + y) * self.side + z) as usize
    }

    /// The `wanted` nearest with their ways, nearest first, of equals the lower.
    fn nearest(&self, from: &Spot, wanted: usize) -> Vec<(u32, u32)> {
        let (home, mut found) = (self.axes(from), Vec::<(f64, u32)>::new());
        for ring in 0..=self.side {
            let range = |axis: usize| (home[axis] - ring).max(0)..=(home[axis] + ring).min(self.side - 1);
            for (x, y) in range(0).flat_map(|x| range(1).map(move |y| (x, y))) {
                let edge = (x - home[0]).abs() == ring || (y - home[1]).abs() == ring;
                let step = if edge || ring == 0 { 1 } else { 2 * ring };
                for z in (home[2] - ring..=home[2] + ring).step_by(step as usize) {
                    if (0..self.side).contains(&z) {
                        let sites = self.cells[self.cell([x, y, z])].iter();
                        found.extend(sites.map(|&n| (chord2(from, &self.sites[n as usize].0), n)));
                    }
                }
            }
            // Whatever is farther out is farther away than the rings seen are wide.
            let seen = f64::from(ring) * 2.0 / f64::from(self.side);
            if found.iter().filter(|f| f.0 <= seen * seen).count() >= wanted {
                break;
            }
        }
        found.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        found.iter().take(wanted).map(|&(_, n)| (n, way(from, &self.sites[n as usize].0))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_finds_the_same_as_looking_at_all() {
        let mut chance = Chance::named(5, &["grid"]);
        let mut any = || spot(chance.fraction() * 180.0 - 90.0, chance.fraction() * 360.0 - 180.0);
        let sites: Vec<_> = (0..500).map(|_| (any(), 0)).collect();
        let grid = Grid::new(&sites, 8);
        for _ in 0..100 {
            let from = any();
            let mut all: Vec<_> = sites.iter().enumerate().map(|(i, s)| (chord2(&from, &s.0), i as u32)).collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0));
            let found: Vec<u32> = grid.nearest(&from, 8).iter().map(|f| f.0).collect();
            assert_eq!(found, all[..8].iter().map(|a| a.1).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_quarter_of_the_earth_is_150_ms() {
        assert!((149_000..151_500).contains(&way(&spot(0.0, 0.0), &spot(0.0, 90.0))));
    }
}
