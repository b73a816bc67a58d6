//! Builds again when the page's bundle gains or loses a file: the embedding macro only watches those it saw.

fn main() {
    println!("cargo:rerun-if-changed=../../dashboards/dist");
}
