//! A tour: recipe ─▶ image in a store ─▶ verified manifest. `build_image RECIPE STORE [NAME MEMORY_MIB]`

use std::path::PathBuf;
use vmatrix_vma_build::build;
use vmatrix_vma_image::inspect;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [recipe, dir, changes @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: build_image RECIPE STORE [NAME MEMORY_MIB]");
    };
    let options = build::Options {
        name: changes.first().cloned(),
        memory_mib: changes.get(1).map(|mib| mib.parse()).transpose()?,
        ..build::Options::default()
    };
    let dir = PathBuf::from(dir);
    let built = build::build(recipe.as_ref(), &dir, &options).await?;
    println!("cached {}, took {:.1} s", built.cached, built.took.as_secs_f64());
    print!("{}", inspect::inspect(&dir, &built.name, &[])?.table());
    Ok(())
}
