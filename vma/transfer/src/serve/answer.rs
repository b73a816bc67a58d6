//! Who answers what other machines ask, beside chunks: question (JSON) ─▶ answer (JSON), or why not.

use crate::identity::Name;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// An answer that is being found.
type Finding = Pin<Box<dyn Future<Output = Result<Vec<u8>, String>> + Send>>;

/// Answers other machines' questions; cheap to clone.
///
/// It is called with the asker's certified name and the question's bytes, which may be any. The answer may have 64 KiB.
/// An error is told to the asker: at most 240 bytes of it. What it begins goes on when the asker goes away.
#[derive(Clone)]
pub struct Answerer(Arc<dyn Fn(Name, Vec<u8>) -> Finding + Send + Sync>);

impl Answerer {
    /// Answers by calling `answer`.
    pub fn new<F, A>(answer: F) -> Answerer
    where
        F: Fn(Name, Vec<u8>) -> A + Send + Sync + 'static,
        A: Future<Output = Result<Vec<u8>, String>> + Send + 'static,
    {
        Answerer(Arc::new(move |name, question| Box::pin(answer(name, question))))
    }

    pub(super) fn answer(&self, name: Name, question: Vec<u8>) -> Finding {
        (self.0)(name, question)
    }
}

impl fmt::Debug for Answerer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answerer")
    }
}
