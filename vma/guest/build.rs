//! The program is a part of every guest: without names and line numbers, which nobody reads there, it is a seventh.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-s");
}
