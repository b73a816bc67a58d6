//! A tour: recipe ─▶ image in a store ─▶ verified manifest. `build_image RECIPE STORE`

use std::path::PathBuf;
use vmatrix_vma_image::{Store, build, sign};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1).map(PathBuf::from);
    let (Some(recipe), Some(dir)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: build_image RECIPE STORE");
    };
    let built = build::build(&recipe, &dir, &build::Options::default()).await?;
    println!(
        "{} {} cached={} in {:.1} s, {} stored, boot {} ms, answer {} ms",
        built.name,
        built.digest.short(),
        built.cached,
        built.took.as_secs_f64(),
        built.stored,
        built.measured.boot_ms,
        built.measured.answer_ms
    );
    let store = Store::read(&dir)?;
    if let Some(signed) = store.image(&built.name)? {
        let (manifest, _) = sign::verify(&signed, &[sign::public(&store)?])?;
        for part in manifest.parts {
            let present = part.chunks.iter().flatten();
            let stored: u64 = present.clone().map(|c| c.stored.0).sum();
            println!("{:?}: {} in {} chunks, {} stored bytes", part.kind, part.size, present.count(), stored);
        }
    }
    Ok(())
}
