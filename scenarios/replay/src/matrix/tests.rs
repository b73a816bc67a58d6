use super::*;
use proptest::prelude::*;

fn tabs(text: &str) -> Result<Matrix, MatrixError> {
    netlatency::parse("m", text.as_bytes())
}

fn clouds(latency: &str, prices: Option<&str>) -> Result<Matrix, MatrixError> {
    let prices = prices.map(|p| ("cost.csv".to_owned(), p.as_bytes()));
    skyplane::parse(("latency.csv".to_owned(), latency.as_bytes()), prices)
}

fn pings(files: &[(&str, &str)]) -> Result<Matrix, MatrixError> {
    let files = files.iter().map(|(region, text)| Ok(((*region).to_owned(), format!("{region}.dat"), text.as_bytes())));
    cloud::parse("pings", files)
}

fn said(read: Result<Matrix, MatrixError>) -> String {
    read.unwrap_err().to_string()
}

const LATENCY: &str = "src_region,src_tier,src_class,dst_region,dst_tier,dst_class,min_rtt,avg_rtt\n";
const COST: &str = "src,dest,src_tier,dest_tier,cost\n";

#[test]
fn both_directions_become_one() {
    let matrix = tabs("0.3\t10\t0\n20\t0\t\n0\t7.0004\t0\n").unwrap();
    assert_eq!(matrix.names, ["node-0", "node-1", "node-2"]);
    // 10 and 20 ms; not known both ways; 7 ms one way.
    let unknown = UNKNOWN;
    assert_eq!(matrix.rtt_us, [0, 15_000, unknown, 15_000, 0, 7_000, unknown, 7_000, 0]);
    assert_eq!((matrix.rtt(0, 1), matrix.rtt(0, 2), matrix.rtt(0, 3)), (Some(15_000), None, None));
    assert_eq!(tabs("0\t0.0001\n0.0001\t0").unwrap().rtt(0, 1), Some(1), "little is not unknown");
}

#[test]
fn what_is_unknown_goes_the_shortest_way_and_what_is_known_stays() {
    // 0–1 10 ms, 1–2 20 ms, 0–3 100 ms although 0–1–3 is 15: only 0–2 and 2–3 are unknown. 4 and 5 know each other only.
    let text = "0\t10\t0\t100\t0\t0\n0\t0\t20\t5\t0\t0\n0\t0\t0\t0\t0\t0\n0\t0\t0\t0\t0\t0\n0\t0\t0\t0\t0\t3\n0\t0\t0\t0\t0\t0";
    let seen = tabs(text).unwrap();
    assert_eq!(seen.describe().unknown, 10);
    let Completed { matrix, filled, dropped } = seen.complete();
    assert_eq!(matrix.names, ["node-0", "node-1", "node-2", "node-3"]);
    let ms = |a, b| matrix.rtt(a, b).unwrap() / 1000;
    assert_eq!((ms(0, 1), ms(0, 2), ms(2, 3), ms(0, 3), ms(3, 0)), (10, 30, 25, 100, 100));
    assert_eq!((filled, &dropped[..]), (2, &["node-4".to_owned(), "node-5".to_owned()][..]));
    assert_eq!(matrix.complete(), Completed { matrix: matrix.clone(), filled: 0, dropped: vec![] });
    let none = Matrix { names: vec![], rtt_us: vec![], egress: None };
    assert_eq!(none.complete().matrix, none);
}

#[test]
fn regions_come_with_prices_by_direction() {
    let latency = format!(
        "{LATENCY}aws:b,PREMIUM,m5,aws:a,PREMIUM,m5,9,10\naws:a,PREMIUM,m5,aws:b,PREMIUM,m5,9,12\n\
         gcp:c,PREMIUM,n2,aws:a,PREMIUM,m5,50,60\ngcp:c,STANDARD,n2,aws:a,PREMIUM,m5,9,1\n\
         gcp:c,PREMIUM,n2,gcp:d,PREMIUM,n2,1,2\ngcp:c,PREMIUM,n2,gcp:c,PREMIUM,n2,1,2\n"
    );
    let cost = format!(
        "{COST}aws:a,aws:b,PREMIUM,PREMIUM,0.02\naws:b,aws:a,PREMIUM,PREMIUM,0.04\naws:b,gcp:c,PREMIUM,PREMIUM,0.09\n\
         aws:b,gcp:x,PREMIUM,PREMIUM,0.12\ngcp:c,aws:a,PREMIUM,PREMIUM,0.1\naws:a,aws:a,PREMIUM,PREMIUM,0.0\n"
    );
    let matrix = clouds(&latency, Some(&cost)).unwrap();
    assert_eq!(matrix.names, ["aws:a", "aws:b", "gcp:c", "gcp:d"]);
    assert_eq!((matrix.rtt(0, 1), matrix.rtt(2, 0), matrix.rtt(1, 2)), (Some(11_000), Some(60_000), None));
    let price = |from, to| matrix.price(from, to).unwrap().0;
    assert_eq!((price(0, 1), price(1, 0), price(1, 2), price(2, 0), price(3, 3)), (20_000, 40_000, 90_000, 100_000, 0));
    // Nobody says what aws:a asks to gcp: the mean of 0.09 and 0.12. Nor what gcp asks within: the mean of all of gcp's.
    assert_eq!((price(0, 3), price(2, 3), price(3, 0)), (105_000, 100_000, 100_000));
    assert_eq!(matrix.complete().matrix.price(1, 2), matrix.price(1, 2));
    assert_eq!(clouds(&latency, None).unwrap().price(0, 1), None);
    let stranger = format!("{COST}azure:a,azure:b,PREMIUM,PREMIUM,0.02\n");
    assert!(said(clouds(&latency, Some(&stranger))).contains("cost.csv: has no price from \"aws:a\""));
}

#[test]
fn pings_of_a_folder_are_joined() {
    let matrix = pings(&[
        ("us", "0.1/0.1/0.2/0.0:us\n80/81/99/1.5:eu\n"),
        ("eu", "80/83/99/1.5:us\n0.1/0.1/0.2/0.0:eu\n200/201/202/0:asia"),
    ]);
    let matrix = matrix.unwrap();
    assert_eq!(matrix.names, ["asia", "eu", "us"]);
    assert_eq!((matrix.rtt(1, 2), matrix.rtt(0, 1), matrix.rtt(0, 2)), (Some(82_000), Some(201_000), None));
    assert_eq!(matrix.complete().matrix.rtt(0, 2), Some(283_000));
}

#[test]
fn bad_input_is_refused_with_its_line() {
    let row = |text: &str| clouds(&format!("{LATENCY}{text}"), None);
    let cost = |text: &str| {
        let latency = format!("{LATENCY}a:a,PREMIUM,m,a:b,PREMIUM,m,1,2\n");
        clouds(&latency, Some(&format!("{COST}a:a,a:b,PREMIUM,PREMIUM,1\n{text}")))
    };
    let wide = ["1"; PLACES_MAX + 1].join("\t");
    for (read, words) in [
        (tabs("0\t1\n1\tNaN\n"), "m:2: round trip \"NaN\" is not a number"),
        (tabs("0\tinf\n1\t0\n"), "m:1: round trip \"inf\" is more than 60000 ms"),
        (tabs("0\t-1\n1\t0\n"), "m:1: round trip \"-1\" is negative"),
        (tabs("0\t60001\n1\t0\n"), "m:1: round trip \"60001\" is more than 60000 ms"),
        (tabs("0\tx\n1\t0\n"), "m:1: round trip \"x\" is not a number"),
        (tabs("0\t1\n1\n"), "m:2: has 1 numbers, the first line has 2"),
        (tabs("0\t1\n"), "m: has 1 rows and 2 columns"),
        (tabs("0\t1\n1\t0\n1\t0\n"), "m:3: is row 3 of a matrix with 2 columns"),
        (tabs(&wide), "m:1: has more than 2000 numbers"),
        (tabs(""), "m: is empty"),
        (row("a:a,PREMIUM,m,a:b,PREMIUM,m,1,-2\n"), "latency.csv:2: round trip \"-2\" is negative"),
        (row("a:a,PREMIUM,m,a:b,PREMIUM,m,1\n"), "latency.csv:2: has no avg_rtt"),
        (row("a a,PREMIUM,m,a:b,PREMIUM,m,1,2\n"), "latency.csv:2: \"a a\" is not the name of a place"),
        (row(",PREMIUM,m,a:b,PREMIUM,m,1,2\n"), "latency.csv:2: \"\" is not the name of a place"),
        (
            row("a:a,PREMIUM,m,a:b,PREMIUM,m,1,2\na:a,PREMIUM,m,a:b,PREMIUM,m,1,2\n"),
            "latency.csv:3: a:a to a:b is there twice",
        ),
        (row(""), "latency.csv: has no pair of places in the tier PREMIUM"),
        (clouds("a,b\n", None), "latency.csv:1: has no column \"src_region\""),
        (clouds("", None), "latency.csv: is empty"),
        (cost("a:b,a:a,PREMIUM,PREMIUM,-0.1\n"), "cost.csv:3: price \"-0.1\" is negative"),
        (cost("a:b,a:a,PREMIUM,PREMIUM,NaN\n"), "cost.csv:3: price \"NaN\" is not a number"),
        (cost("a:b,a:a,PREMIUM,PREMIUM,\n"), "cost.csv:3: price \"\" is not a number"),
        (cost("a:b,a:a,PREMIUM,PREMIUM,1001\n"), "cost.csv:3: price \"1001\" is more than 1000 USD"),
        (pings(&[("us", "1/2/3:eu\n")]), "us.dat:1: \"1/2/3\" is not min/avg/max/mdev"),
        (pings(&[("us", "1/2/3/4\n")]), "us.dat:1: \"1/2/3/4\" is not min/avg/max/mdev:region"),
        (pings(&[("us", "1/2/-3/4:eu\n")]), "us.dat:1: time \"-3\" is negative"),
        (pings(&[("us", "1/2/3/4:eu\n1/2/3/4:eu\n")]), "us.dat:2: eu is there twice"),
        (pings(&[("us", "")]), "pings: its files are empty"),
    ] {
        let told = said(read);
        assert!(told.starts_with(words), "{told} is not {words}");
    }
    let many: String = (0..=PLACES_MAX).map(|i| format!("a:a,PREMIUM,m,b:{i},PREMIUM,m,1,2\n")).collect();
    assert!(said(row(&many)).contains("is one place more than the 2000 that are taken"));
}

#[test]
fn what_is_said_of_a_matrix_is_what_it_is() {
    let matrix = tabs("0\t10\t20\n10\t0\t0\n20\t0\t0").unwrap();
    let seen = matrix.describe();
    assert_eq!((seen.places, seen.unknown, seen.rtt_us), (3, 1, Some([10_000, 10_000, 10_000, 20_000])));
    let said = "3 places, 1 pairs not measured\nround trip  10.0 to 20.0 ms, median 10.0, 90th percentile 10.0\n";
    assert_eq!(seen.to_string(), said);
    assert_eq!(tabs("0").unwrap().describe().rtt_us, None);
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = netlatency::parse("m", &bytes[..]);
        let after = |start: &str| [start.as_bytes(), &bytes].concat();
        let _ = skyplane::parse(("l".to_owned(), &after(LATENCY)[..]), Some(("c".to_owned(), &after(COST)[..])));
        let _ = cloud::parse("p", std::iter::once(Ok(("us".to_owned(), "us.dat".to_owned(), &bytes[..]))));
    }

    #[test]
    fn completed_ways_are_no_longer_than_any_detour(
        n in 1usize..9, ms in proptest::collection::vec(prop_oneof![Just(0u32), 1u32..300], 64)
    ) {
        let rows: Vec<String> = ms.chunks(8).take(n).map(|r| {
            r.iter().take(n).map(|ms| ms.to_string()).collect::<Vec<_>>().join("\t")
        }).collect();
        if n < 9 && rows.len() == n {
            let seen = tabs(&rows.join("\n")).unwrap();
            let done = seen.complete();
            prop_assert_eq!(done.matrix.len() + done.dropped.len(), n);
            let m = &done.matrix;
            let at = |i: usize| seen.names.iter().position(|name| *name == m.names[i]).unwrap();
            for (a, b) in (0..m.len()).flat_map(|a| (0..m.len()).map(move |b| (a, b))) {
                let way = m.rtt(a, b).unwrap();
                prop_assert_eq!(Some(way), m.rtt(b, a));
                prop_assert_eq!(way == 0, a == b);
                match seen.rtt(at(a), at(b)) {
                    Some(measured) => prop_assert_eq!(way, measured),
                    None => for c in (0..m.len()).filter(|c| *c != a && *c != b) {
                        prop_assert!(way <= m.rtt(a, c).unwrap() + m.rtt(c, b).unwrap());
                    },
                }
            }
        }
    }
}

/// Recorded data, if this machine has it.
fn recorded(what: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("VMATRIX_DATA").map(|data| PathBuf::from(data).join(what));
    if folder.is_none() {
        eprintln!(
            "NOT TESTED on {what}: VMATRIX_DATA does not name the folder of recorded data (docs/placement-data.md)"
        );
    }
    folder
}

#[test]
fn recorded_planetlab_and_seattle_are_whole() {
    let Some(folder) = recorded("netlatency") else { return };
    let planetlab = read(&folder.join("PlanetLabData_10")).unwrap();
    assert_eq!(planetlab.len(), 490);
    let done = planetlab.complete();
    assert_eq!((done.filled, done.dropped.len()), (0, 0));
    assert_eq!(done.matrix, planetlab);
    let seattle = read(&folder.join("SeattleData_1")).unwrap();
    assert_eq!(seattle.len(), 99);
    assert!(seattle.complete().matrix.describe().unknown == 0);
}

#[test]
fn recorded_clouds_have_prices_everywhere() {
    let Some(folder) = recorded("skyplane") else { return };
    let matrix = read(&folder).unwrap();
    assert_eq!((matrix.len(), matrix.describe().unknown), (69, 0));
    let prices = matrix.egress.as_ref().unwrap();
    let dear = (0..69 * 69).filter(|i| i / 69 != i % 69).all(|i| (10_000..=190_000).contains(&prices[i].0));
    assert!(dear, "lists ask 0.01 to 0.19 USD a GB, and so do their means");
}

#[test]
fn recorded_pings_are_joined() {
    let Some(folder) = recorded("cloud-latency") else { return };
    for (part, regions) in [("latency_gcp", 20), ("latency_aws/2020_06_05", 19), ("latency_aws/2021_02_13", 5)] {
        let matrix = read(&folder.join(part)).unwrap();
        assert_eq!((matrix.len(), matrix.describe().unknown), (regions, 0), "{part}");
    }
    assert!(said(read(&folder)).contains("holds no matrix that can be read"));
}
