//! A recipe's requests, sent from inside a cell: to warm a guest, and to see what it touches.
//!
//! ```text
//! [[warm]] ─warm─▶ each so many times, one kind after the other      ─spread─▶ 60 of them, all kinds mixed
//! ```

use super::tools;
use crate::recipe::Request;
use crate::workshop::CLIENT;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use vmatrix_model::manifest::Health;
use vmatrix_vma_image::error::{Error, Result};
use vmatrix_vma_image::netns;

/// One request.
const LIMIT_S: u32 = 30;
/// Most times a request is sent in the second pass.
const AGAIN: u32 = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    All,
    Again,
}

/// Sends the recipe's requests and returns the median of the measured ones, milliseconds.
pub fn warm(requests: &[Request], to: Ipv4Addr, netns: &Path, pass: Pass) -> Result<u64> {
    let mut times = Vec::new();
    for request in requests {
        let count = if pass == Pass::All { request.times } else { request.times.min(AGAIN) };
        for n in 0..count {
            // The second pass counts on: its requests are new ones too.
            let number = if pass == Pass::All { n } else { request.times + n };
            let took = send(request, to, netns, number)?;
            if request.measured {
                times.push(took);
            }
        }
    }
    times.sort_unstable();
    Ok(times.get(times.len() / 2).copied().unwrap_or(0))
}

/// `count` requests, each with its number: every kind from the first on, in proportion to how often the recipe
/// sends it, numbered from `skip` on, so that another `skip` asks for other things.
pub fn spread(requests: &[Request], count: u32, skip: u32) -> Vec<(&Request, u32)> {
    let total: u32 = requests.iter().map(|r| r.times).sum();
    let mut sent = vec![0u32; requests.len()];
    let mut list = Vec::new();
    for at in 0..if total == 0 { 0 } else { count } {
        // Whoever is furthest behind its share; at first the order of the recipe, which may be needed.
        let behind = |(index, request): (usize, &Request)| {
            let due = u64::from(request.times) * u64::from(at + 1);
            let done = u64::from(sent.get(index).copied().unwrap_or(0)) * u64::from(total);
            (i128::from(due) - i128::from(done), std::cmp::Reverse(index))
        };
        let unsent = sent.iter().position(|n| *n == 0);
        let next = unsent.or_else(|| requests.iter().enumerate().max_by_key(|r| behind(*r)).map(|(i, _)| i));
        let Some((request, n)) = next.and_then(|i| requests.get(i).zip(sent.get_mut(i))) else { break };
        list.push((request, (*n + skip) % request.times.max(1)));
        *n += 1;
    }
    list
}

/// What is asked of a guest whose recipe asks nothing: whether it is well.
pub fn of_health(health: &Health) -> Request {
    Request {
        times: 1,
        method: "GET".to_owned(),
        port: health.port,
        tls: false,
        path: health.path.clone(),
        user: None,
        content_type: None,
        body: None,
        status: vec![health.status],
        answers: None,
        measured: false,
    }
}

/// Sends one request and returns how long its answer took, milliseconds.
pub fn send(request: &Request, to: Ipv4Addr, netns: &Path, number: u32) -> Result<u64> {
    let number = number.to_string();
    let scheme = if request.tls { "https" } else { "http" };
    let url = format!("{scheme}://{to}:{}{}", request.port, request.path.replace("{n}", &number));
    let mut curl = Command::new("curl");
    curl.args(["-sS", "-k", "-g", "-o", "/dev/null", "-w", "%{http_code} %{time_total} %{content_type}"])
        .args(["-m", &LIMIT_S.to_string(), "--interface", &CLIENT.to_string()])
        .args(["-X", &request.method])
        .stderr(Stdio::piped());
    if let Some(user) = &request.user {
        curl.args(["-u", user]);
    }
    if let Some(kind) = &request.content_type {
        curl.args(["-H", &format!("Content-Type: {kind}")]);
    }
    if let Some(body) = &request.body {
        curl.args(["--data-binary", &body.replace("{n}", &number)]);
    }
    let what = format!("{} {url}", request.method);
    let output = netns::enter(netns, || tools::run(&what, curl.arg(&url)))??;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace();
    let status = words.next().and_then(|w| w.parse::<u16>().ok()).unwrap_or(0);
    if !request.status.contains(&status) {
        return Err(Error::Unhealthy(format!("warm request {what} was answered {status}, not {:?}", request.status)));
    }
    let seconds: f64 = words.next().and_then(|w| w.parse().ok()).unwrap_or(0.0);
    let kind = words.next().unwrap_or("nothing").trim_end_matches(';');
    if let Some(right) = request.answers.as_deref().filter(|right| *right != kind) {
        return Err(Error::Unhealthy(format!("warm request {what} was answered with {kind}, not {right}")));
    }
    Ok((seconds * 1e3) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &str, times: u32) -> Request {
        let health = Health { port: 80, path: path.to_owned(), status: 200 };
        Request { times, ..of_health(&health) }
    }

    #[test]
    fn sixty_requests_are_of_every_kind_in_proportion_and_begin_with_one_of_each() {
        let recipe = [request("/once", 1), request("/put", 12), request("/get", 12), request("/health", 3)];
        let list = spread(&recipe, 60, 0);
        let count = |path: &str| list.iter().filter(|(r, _)| r.path == path).count();
        assert_eq!(list.len(), 60);
        assert_eq!(
            list.iter().take(4).map(|(r, _)| r.path.as_str()).collect::<Vec<_>>(),
            ["/once", "/put", "/get", "/health"]
        );
        assert!((24..=28).contains(&count("/put")) && (24..=28).contains(&count("/get")), "{list:?}");
        assert!((1..=3).contains(&count("/once")) && (5..=8).contains(&count("/health")), "{list:?}");
    }

    #[test]
    fn a_thing_is_read_after_it_was_put_and_another_skip_asks_for_others() {
        let recipe = [request("/put", 12), request("/get", 12)];
        for skip in [0, 5] {
            let list = spread(&recipe, 60, skip);
            for (at, (r, n)) in list.iter().enumerate().filter(|(_, (r, _))| r.path == "/get") {
                let put = list.iter().take(at).any(|(p, m)| p.path == "/put" && m == n);
                assert!(put, "{} {n} is read before it is there", r.path);
            }
        }
        assert_eq!(spread(&recipe, 1, 5).first().map(|(_, n)| *n), Some(5));
    }

    #[test]
    fn a_recipe_that_asks_nothing_is_spread_to_nothing() {
        assert!(spread(&[], 60, 0).is_empty());
    }
}
