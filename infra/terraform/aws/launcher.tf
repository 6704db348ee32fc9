# Who the nodes of Ray's cluster launcher are (ray_cluster.yaml), for those who start it in this network: the head may
# start and end machines of its cluster, a worker may not. Both read and write the bucket.

locals {
  launcher_clusters = coalesce(var.launcher_clusters, [var.name])

  machines = {
    Version = "2012-10-17"
    Statement = [
      {
        Sid      = "Look"
        Effect   = "Allow"
        Action   = "ec2:Describe*"
        Resource = "*"
      },
      {
        Sid      = "Start"
        Effect   = "Allow"
        Action   = "ec2:RunInstances"
        Resource = "*"
      },
      {
        Sid       = "NameWhatItStarts"
        Effect    = "Allow"
        Action    = "ec2:CreateTags"
        Resource  = "*"
        Condition = { StringEquals = { "ec2:CreateAction" = "RunInstances" } }
      },
      # Ray writes the name of the cluster on each of its machines.
      {
        Sid       = "EndItsOwn"
        Effect    = "Allow"
        Action    = ["ec2:TerminateInstances", "ec2:CreateTags"]
        Resource  = "*"
        Condition = { StringEquals = { "ec2:ResourceTag/ray-cluster-name" = local.launcher_clusters } }
      },
      # Machines it starts are workers, never heads.
      {
        Sid       = "OnlyWorkers"
        Effect    = "Allow"
        Action    = "iam:PassRole"
        Resource  = aws_iam_role.launched["worker"].arn
        Condition = { StringEquals = { "iam:PassedToService" = "ec2.amazonaws.com" } }
      },
    ]
  }
}

resource "aws_iam_role" "launched" {
  for_each           = toset(["head", "worker"])
  name               = "${var.name}-${each.key}"
  assume_role_policy = local.machines_assume
}

resource "aws_iam_role_policy" "launched_bucket" {
  for_each = aws_iam_role.launched
  name     = "bucket"
  role     = each.value.id
  policy   = local.bucket
}

resource "aws_iam_role_policy" "launched_machines" {
  name   = "machines"
  role   = aws_iam_role.launched["head"].id
  policy = jsonencode(local.machines)
}

resource "aws_iam_instance_profile" "launched" {
  for_each = aws_iam_role.launched
  name     = each.value.name
  role     = each.value.name
}
