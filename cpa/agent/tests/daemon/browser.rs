//! The page in a real browser: the bundle boots, its events arrive, and what they say is on the screen.
//!
//! `--dump-dom` writes the document when it has loaded, which is before the first event, and virtual time stands
//! still while a stream is open. So the browser is asked, over its debugging pipe: JSON messages that end in a NUL.

use crate::world::{configure, free_port, networks, report, start};
use serde_json::{Value, json};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};

/// To start, load, and draw what the first event says; a busy machine takes tens of seconds to start a browser.
const DRAWN_WITHIN: Duration = Duration::from_secs(60);
/// Debian's package `chromium`.
const BROWSER: &str = "/usr/bin/chromium";
const FLAGS: [&str; 11] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
];

struct Browser {
    process: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    asked: u64,
}

impl Browser {
    fn start(profile: &std::path::Path) -> Browser {
        assert!(
            std::path::Path::new(BROWSER).exists(),
            "there is no {BROWSER}: install the Debian package `chromium`, without which nobody sees whether the page boots"
        );
        // The pipe is descriptors 3 and 4 of the browser: the ends this process has of its input and output.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "sh", BROWSER]).args(FLAGS);
        command.arg(format!("--user-data-dir={}", profile.display())).arg("about:blank");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut process = command.spawn().unwrap();
        let (ask, answers) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        Browser { process, ask, answers, asked: 0 }
    }

    /// Asks one thing, and passes over what else the browser says until the answer comes.
    async fn ask(&mut self, method: &str, session: Option<&str>, params: Value) -> Value {
        self.asked += 1;
        let mut message = json!({ "id": self.asked, "method": method, "params": params });
        if let Some(session) = session {
            message["sessionId"] = json!(session);
        }
        self.ask.write_all(format!("{message}\0").as_bytes()).await.unwrap();
        loop {
            let mut said = vec![];
            let n = self.answers.read_until(0, &mut said).await.unwrap();
            assert!(n > 0, "the browser ended while it was asked for {method}");
            said.pop();
            let said: Value = serde_json::from_slice(&said).unwrap();
            if said["id"] == self.asked {
                assert!(said["error"].is_null(), "{method}: {said}");
                return said["result"].clone();
            }
        }
    }

    /// Opens a page and gives its text as people read it, until that holds every one of `words`.
    async fn read(&mut self, url: &str, words: &[&str]) {
        let target = self.ask("Target.createTarget", None, json!({ "url": url })).await["targetId"].clone();
        let params = json!({ "targetId": target, "flatten": true });
        let session = self.ask("Target.attachToTarget", None, params).await["sessionId"].as_str().unwrap().to_owned();
        let until = Instant::now() + DRAWN_WITHIN;
        loop {
            let text = json!({ "expression": "document.body ? document.body.innerText : ''" });
            let answer = self.ask("Runtime.evaluate", Some(&session), text).await;
            let text = answer["result"]["value"].as_str().unwrap_or_default().to_owned();
            if words.iter().all(|w| text.contains(w)) {
                return;
            }
            assert!(
                Instant::now() < until,
                "within {DRAWN_WITHIN:?} the page should name {words:?}; it reads:\n{text}"
            );
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Closes it and its children, so that nothing is left in its folder.
    async fn close(mut self) {
        self.ask("Browser.close", None, json!({})).await;
        drop(self.ask);
        let ended = timeout(Duration::from_secs(10), self.process.wait()).await;
        assert!(ended.is_ok(), "the browser does not close");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machine_the_page_boots_in_a_real_browser() {
    let dir = tempfile::tempdir().unwrap();
    let (networks, agents) = networks().await;
    let (port, page_port) = (free_port().await, free_port().await);
    let base = format!("http://127.0.0.1:{port}");
    let config = configure(dir.path(), port, &format!("page_listen = \"127.0.0.1:{page_port}\"\n"), &agents);
    let daemon = start(&config, &base).await;
    let reports = report(networks.clone(), base);

    let mut browser = Browser::start(&dir.path().join("browser"));
    let words: Vec<&str> = networks.keys().copied().chain(["live"]).collect();
    let url = format!("http://127.0.0.1:{page_port}/");
    let read = timeout(DRAWN_WITHIN + Duration::from_secs(15), browser.read(&url, &words));
    read.await.expect("the browser answers");
    browser.close().await;
    reports.abort();
    daemon.abort();
}
