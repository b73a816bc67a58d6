//! The wire, with bytes of every kind.

use super::*;
use proptest::prelude::*;

fn body(frame: &[u8]) -> &[u8] {
    assert_eq!(frame.len() - 4, u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize);
    assert!(frame.len() <= 16_384, "more than a TLS record");
    &frame[4..]
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn class() -> impl Strategy<Value = Class> {
    prop::sample::select(Class::ALL.to_vec())
}

fn request() -> impl Strategy<Value = Request> {
    let how = prop::sample::select(vec![How::Plain, How::Patient, How::Insist]);
    let image = prop_oneof![digest().prop_map(ImageRef::Digest), "[a-z]{1,30}".prop_map(ImageRef::Name)];
    prop_oneof![
        any::<SocketAddr>().prop_filter("no scope on the wire", plain_address).prop_map(Request::Serving),
        (any::<u32>(), image, prop::option::of(digest()), any::<bool>())
            .prop_map(|(request, image, have, push)| Request::Open { request, image, have, push }),
        (digest(), class(), how).prop_map(|(digest, class, how)| Request::Get { digest, class, how }),
        digest().prop_map(|digest| Request::Cancel { digest }),
        digest().prop_map(|id| Request::Key { id }),
        any::<u32>().prop_map(|bytes| Request::Warm { bytes }),
        any::<u64>().prop_map(|token| Request::Ping { token }),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..=QUESTION_MAX))
            .prop_map(|(request, question)| Request::Ask { request, question }),
    ]
}

fn plain_address(a: &SocketAddr) -> bool {
    *a == SocketAddr::new(a.ip(), a.port())
}

proptest! {
    #[test]
    fn any_bytes_are_a_frame_or_a_named_fault(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Request::decode(&bytes);
        let _ = Answer::decode(&bytes);
        // Right kinds with wrong bodies are the harder case.
        for kind in (1..=8).chain(65..=72) {
            let mut frame = bytes.clone();
            frame.insert(0, kind);
            let _ = Request::decode(&frame);
            let _ = Answer::decode(&frame);
        }
    }

    #[test]
    fn a_request_reads_back(r in request()) {
        prop_assert_eq!(Request::decode(body(&r.encode())), Ok(r));
    }

    #[test]
    fn a_request_cut_short_or_with_more_behind_is_refused(r in request(), cut in any::<prop::sample::Index>()) {
        let frame = r.encode();
        let body = body(&frame);
        let short = &body[..cut.index(body.len())];
        prop_assert!(Request::decode(short).is_err());
        let mut long = body.to_vec();
        long.push(0);
        prop_assert!(Request::decode(&long).is_err());
    }

    #[test]
    fn answers_read_back(
        stream in any::<u32>(), length in any::<u32>(), d in digest(), token in any::<u64>(),
        text in "\\PC{0,300}", data in prop::collection::vec(any::<u8>(), 0..DATA_MAX),
        addresses in prop::collection::vec(any::<SocketAddr>().prop_filter("no scope", plain_address), 0..=4),
    ) {
        let answers = [
            Answer::Begin { stream, what: What::Manifest { request: length }, length },
            Answer::Begin { stream, what: What::Chunk { digest: d }, length },
            Answer::Begin { stream, what: What::Key { id: d }, length },
            Answer::Data { stream, bytes: &data },
            Answer::Reset { stream },
            Answer::Missing { digest: d },
            Answer::Elsewhere { digest: d, addresses },
            Answer::Begin { stream, what: What::Pushed { request: length }, length },
            Answer::Begin { stream, what: What::Reply { request: stream }, length },
            Answer::Pad { bytes: &data },
            Answer::Pong { token },
        ];
        for answer in answers {
            let frame = answer.encode();
            prop_assert_eq!(Answer::decode(body(&frame)), Ok(answer));
        }
        let refers = Refers::Key { id: d };
        let frame = Answer::Refused { refers, text: text.clone() }.encode();
        let Ok(Answer::Refused { refers: back, text: cut }) = Answer::decode(body(&frame)) else { panic!() };
        prop_assert_eq!(back, refers);
        prop_assert!(text.starts_with(&cut) && (cut == text || cut.len() > TEXT_MAX - 4));
    }
}

#[tokio::test]
async fn a_length_out_of_bounds_is_refused_before_anything_is_allocated() {
    let mut frame = Vec::new();
    for (length, fault) in [(0u32, "empty"), (FRAME_MAX as u32 + 1, "more than"), (u32::MAX, "more than")] {
        let mut from: &[u8] = &length.to_be_bytes();
        let error = read(&mut from, &mut frame).await.unwrap_err().to_string();
        assert!(error.contains(fault), "{length}: {error}");
        assert_eq!(frame.capacity(), 0, "room was made for {length} bytes");
    }
    let mut cut: &[u8] = &[0, 0, 0, 9, 1, 2];
    assert!(matches!(read(&mut cut, &mut frame).await, Err(ReadError::Io(_))));
    let mut ended: &[u8] = &[];
    assert!(!read(&mut ended, &mut frame).await.unwrap());
}
